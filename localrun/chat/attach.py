"""Text files as a part of a message."""

from __future__ import annotations

import re
from pathlib import Path

from ...errors import ArtifactError

_BYTES_PER_TOKEN = 32  # a text with more than this for each token of context cannot fit: it is not even read


def read_text(path: Path, n_ctx: int) -> str:
    """Return a text file's text, to be shown in a conversation of n_ctx tokens.

    Raises:
        ArtifactError: it is no file, no UTF-8 text, or far too large.
    """
    if not path.is_file():
        raise ArtifactError(f"no file at {path}" if not path.exists() else f"{path} is no file")
    limit = n_ctx * _BYTES_PER_TOKEN
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror}") from error
    if b"\0" in data:
        raise ArtifactError(f"{path} is binary", "only text can be attached")
    if len(data) > limit:
        size = path.stat().st_size
        raise ArtifactError(f"{path} holds {size:,} bytes, more than any context of {n_ctx:,} tokens", "attach a part")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{path} is not UTF-8 text", "convert it: iconv -f latin1 -t utf-8") from error


def fenced(name: str, text: str) -> str:
    """Return a file as a message shows it, in a fence that the text does not close."""
    fence = "`" * max([3, *(len(ticks) + 1 for ticks in re.findall(r"`+", text))])
    return f"{name}:\n{fence}\n{text.rstrip()}\n{fence}\n\n"
