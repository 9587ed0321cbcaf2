"""Text files that a user attaches to a message."""

from __future__ import annotations

import re
from pathlib import Path

from ...errors import ArtifactError
from ..core.text import read_text

_BYTES_PER_TOKEN = 32  # a longer text cannot fit the context, so it is not even read


def read_attachment(path: Path, n_ctx: int) -> str:
    """Return a file's text, for a conversation with a context of n_ctx tokens.

    Raises:
        ArtifactError: code "no-such-file", "file-unreadable", "file-not-text" or "prompt-too-long".
    """
    if not path.is_file():
        raise ArtifactError(
            f"there is no file {path}" if not path.exists() else f"{path} is a folder", code="no-such-file"
        )
    size = path.stat().st_size
    if size > n_ctx * _BYTES_PER_TOKEN:
        raise ArtifactError(
            f"{path} has {size:,} bytes, more than any context of {n_ctx:,} tokens holds",
            "attach a part of it",
            code="prompt-too-long",
        )
    text = read_text(path)
    if "\0" in text:
        raise ArtifactError(f"{path} is binary", "only text can be attached", code="file-not-text")
    return text


def fenced(name: str, text: str) -> str:
    """Return a file as a message shows it: in a code fence that is longer than any in the text."""
    fence = "`" * max([3, *(len(ticks) + 1 for ticks in re.findall(r"`+", text))])
    return f"{name}:\n{fence}\n{text.rstrip()}\n{fence}\n\n"
