"""Text files, and sizes, durations, lists and errors, each in one line for people: the one place of their wording."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from ...errors import ArtifactError, UsageError

_SIZES = {"K": 1e3, "M": 1e6, "G": 1e9}


def read_text(path: Path) -> str:
    """Return a file's UTF-8 text, without a byte order mark.

    Raises:
        ArtifactError: code "file-unreadable" or "file-not-text".
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror or error}", code="file-unreadable") from error
    except UnicodeDecodeError as error:
        hint = "convert it: iconv -f latin1 -t utf-8"
        raise ArtifactError(f"{path} is not UTF-8 text", hint, code="file-not-text") from error


def format_bytes(n: float) -> str:
    """Return a size as download pages write it: 512 B, 3.2 kB, 145 MB, 4.1 GB (decimal)."""
    if n < 1e3:
        return f"{n:.0f} B"
    if n >= 1e9:
        return f"{n / 1e9:,.1f} GB"
    size, unit = (n / 1e6, "MB") if n >= 1e6 else (n / 1e3, "kB")
    return f"{size:.0f} {unit}" if size >= 10 else f"{size:.1f} {unit}"


def format_duration(seconds: float) -> str:
    """Return a duration as people say it: 45 s, 12 min, 3.5 h, 120 h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    hours = seconds / 3600
    return f"{hours:.1f} h" if hours < 48 else f"{hours:,.0f} h"


def first_line(error: BaseException) -> str:
    """Return the first line of what a library's error says, or the error's class where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip()


def shorten(text: str, n: int) -> str:
    """Return the text on one line, cut to n characters; a character that a terminal would obey becomes �."""
    line = "".join(c if c.isprintable() else "�" for c in " ".join(text[: 4 * n].split()))
    return line if len(line) <= n else line[: n - 1] + "…"


def sparkline(values: Sequence[float]) -> str:
    """Return values as a line of small blocks, the lowest and the highest finite one at its bounds: ▇▅▃▂▁."""
    blocks = "▁▂▃▄▅▆▇"
    known = [value for value in values if math.isfinite(value)]
    low, high = min(known, default=0.0), max(known, default=0.0)
    return "".join(blocks[round((len(blocks) - 1) * (value - low) / ((high - low) or 1.0))] for value in known)


def listed(items: Iterable[object], *, most: int | None = None) -> str:
    """Return items as a sentence lists them: "a, b and c"; beyond the first `most`, "a, b and 3 more"."""
    texts = [str(item) for item in items]
    if most is not None and len(texts) > most:
        texts[most:] = [f"{len(texts) - most:,} more"]
    return " and ".join([", ".join(texts[:-1]), texts[-1]] if len(texts) > 1 else texts)


def parse_size(text: str) -> int:
    """Return the bytes of a size such as `500M`, `2G` or `90MB`, where 1K is 1,000 as on disks.

    Raises:
        UsageError: `code` "bad-size".
    """
    plain = text.strip().upper().removesuffix("B")
    factor = _SIZES.get(plain[-1:], 1.0)
    try:
        size = int(float(plain[:-1] if plain[-1:] in _SIZES else plain) * factor)
    except (ValueError, OverflowError):
        size = 0
    if size <= 0:
        raise UsageError(f"{text!r} is not a size", "write it as 500M or 2G", code="bad-size")
    return size
