"""Rows of problems from a file, a folder of prompts, or a data set on the Hugging Face hub.

A row is a mapping of columns. A prompt is a row with a question alone: a line of a .txt file, a whole .md file, or each
.txt or .md file of a folder.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...errors import ArtifactError, UsageError
from ..hub import download_split

Columns = Mapping[str, Any]
"""One row of a table, by column."""

_PROMPTS = (".txt", ".md")


def read_rows(path: Path) -> Iterator[tuple[str, Columns]]:
    """Yield (place, row) of a file, which its suffix says how to read, or of a folder of prompts.

    Raises:
        UsageError: `code` "unknown-format": the suffix is none of ours.
        ArtifactError: `code` "no-such-file", "file-unreadable", "file-broken", "line-broken", or "no-problems" if a
            folder has no prompt.
    """
    if path.is_dir():
        yield from _read_folder(path)
        return
    if not path.is_file():
        raise ArtifactError(
            f"there is no file of problems at {path}",
            "problems are gym:NAME?param=value, hf:ORG/NAME, a .jsonl, .csv, .parquet or .txt file, or a folder",
            code="no-such-file",
        )
    read = _READERS.get(path.suffix.lower())
    if read is None:
        raise UsageError(
            f"cannot tell the format of {path}",
            "files of problems end in .jsonl, .csv, .parquet, .txt or .md",
            code="unknown-format",
        )
    with _translated(path):
        yield from read(path)


def read_hub(repository: str, *, split: str, config: str | None, offline: bool) -> Iterator[tuple[str, Columns]]:
    """Yield (place, row) of one split of a data set on the hub; offline, of the cache.

    Raises:
        UsageError, ArtifactError: see `hub.download_split`.
    """
    for path in download_split(repository, split=split, config=config, offline=offline):
        for _, row in read_rows(path):
            yield f"hf:{repository} {path.name}", row


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, csv.Error) as error:  # json, unicode and pyarrow errors are ValueErrors
        hint = "mend the file, or convert it to UTF-8 .jsonl"
        raise ArtifactError(f"{path} is broken: {error}", hint, code="file-broken") from error
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error}", "check the file", code="file-unreadable") from error


def _read_folder(path: Path) -> Iterator[tuple[str, Columns]]:
    """Yield each .txt and .md file of a folder as a prompt, in the order of their names."""
    files = sorted(
        file
        for file in path.rglob("*")
        if file.suffix.lower() in _PROMPTS
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    )
    if not files:
        raise ArtifactError(
            f"{path} has no .txt or .md file", "a folder of problems has one prompt a file", code="no-problems"
        )
    for file in files:
        with _translated(file):
            text = file.read_text(encoding="utf-8-sig").strip()
        if text:
            yield str(file), {"question": text}


def _read_json_lines(path: Path) -> Iterator[tuple[str, Columns]]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            hint = "mend that line: a file of problems has one JSON object a line"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                fault = f"{error.msg.removesuffix(' at')} at column {error.colno}"
                raise ArtifactError(f"{path}:{number} is not JSON: {fault}", hint, code="line-broken") from error
            if not isinstance(row, dict):
                raise ArtifactError(f"{path}:{number} is not a JSON object", hint, code="line-broken")
            yield f"{path}:{number}", row


def _read_csv(path: Path) -> Iterator[tuple[str, Columns]]:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        for number, row in enumerate(csv.DictReader(lines, strict=True), 2):
            yield f"{path}:{number}", row


def _read_parquet(path: Path) -> Iterator[tuple[str, Columns]]:
    import pyarrow.parquet

    number = 0
    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=1000):
            for row in batch.to_pylist():
                number += 1
                yield f"{path} row {number}", row


def _read_lines(path: Path) -> Iterator[tuple[str, Columns]]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield f"{path}:{number}", {"question": line.strip()}


def _read_markdown(path: Path) -> Iterator[tuple[str, Columns]]:
    yield str(path), {"question": path.read_text(encoding="utf-8-sig")}


_READERS: dict[str, Callable[[Path], Iterator[tuple[str, Columns]]]] = {
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_lines,
    ".md": _read_markdown,
}
