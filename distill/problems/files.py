"""Rows of problems and traces from a file, a folder of prompts, or a data set on the Hugging Face hub.

A row is a mapping of columns; where one cannot be read, its place in the stream has the error instead, so that one bad
row is never the end. A prompt is a row with a question alone: a line of a .txt file, a whole .md file, or each .txt or
.md file of a folder. No file takes more than some 100 MB of memory, however it was made.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeAlias

from ...errors import ArtifactError, UsageError
from ..hub import download_split

Columns: TypeAlias = Mapping[str, Any]
"""One row of a table, by column."""
Row: TypeAlias = Columns | ArtifactError
"""One row, or what is wrong with it."""

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt", ".md")
_PROMPTS = (".txt", ".md")
_NO_PROMPTS = ("readme", "license", "changelog", "contributing", "citation", "notice")
_MAX_TEXT = 16 << 20  # characters of a line or a field
_MAX_DOCUMENT = 256 << 20  # bytes of a .json file, which has to be read at once
_MAX_GROUP = 1 << 30  # bytes of a Parquet row group, uncompressed
_ROWS_AT_ONCE = 500  # of a Parquet file, if their texts are short
_SHORT_TEXT = 64 << 10  # bytes


def read_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """Yield (place, row) of a file, which its suffix says how to read, or of a folder of prompts.

    A row that cannot be read is an ArtifactError: `code` "line-broken", "line-too-long" or "too-many-fields".

    Raises:
        UsageError: `code` "unknown-format": the suffix is none of ours.
        ArtifactError: `code` "no-such-file", "file-unreadable", "file-broken", "file-too-large", or "no-problems" if a
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
    suffixes = [suffix.lower() for suffix in path.suffixes]
    kind = suffixes[-2] if suffixes[-1:] == [".gz"] and len(suffixes) > 1 else (suffixes or [""])[-1]
    if kind not in SUFFIXES:
        hint = f"files of problems end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}, or in one of these and .gz"
        raise UsageError(f"cannot tell the format of {path}", hint, code="unknown-format")
    with _translated(path):
        yield from _READERS[kind](path)


def read_hub(repository: str, *, split: str, config: str | None, offline: bool) -> Iterator[tuple[str, Row]]:
    """Yield (place, row) of one split of a data set on the hub; offline, of the cache.

    Raises:
        UsageError, ArtifactError: see `hub.download_split`.
    """
    for path in download_split(repository, split=split, config=config, offline=offline):
        for _, row in read_rows(path):
            yield f"hf:{repository} {path.name}", row


def is_text(path: Path) -> bool:
    """Say whether a path is a file of problems that is text, so that it has an encoding."""
    return path.is_file() and ".parquet" not in path.suffixes


def encoding_of(path: Path) -> str:
    """Return how a text file is encoded: UTF-8, UTF-16 if it has its mark, else Windows' cp1252."""
    with _open_bytes(path) as file:
        start = file.read(4)
        if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            return "utf-16"
        decoder = codecs.getincrementaldecoder("utf-8")()
        try:
            decoder.decode(start)
            while block := file.read(1 << 20):
                decoder.decode(block)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            return "cp1252"
    return "utf-8-sig"


def _open_bytes(path: Path) -> gzip.GzipFile | io.BufferedReader:
    return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")


@contextmanager
def _open_text(path: Path) -> Iterator[IO[str]]:
    encoding = encoding_of(path)
    opened = gzip.open if path.suffix.lower() == ".gz" else open
    with opened(path, "rt", encoding=encoding, newline="") as text:
        yield text


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, csv.Error, EOFError) as error:  # json, unicode and pyarrow errors are ValueErrors
        hint = "mend the file, or convert it to UTF-8 .jsonl"
        raise ArtifactError(f"{path} is broken: {error}", hint, code="file-broken") from error
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error}", "check the file", code="file-unreadable") from error


def _read_folder(path: Path) -> Iterator[tuple[str, Row]]:
    """Yield each .txt and .md file of a folder as a prompt, in the order of their names, but not its README."""
    files = sorted(
        file
        for file in path.rglob("*")
        if file.suffix.lower() in _PROMPTS
        and file.stem.lower() not in _NO_PROMPTS
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    )
    if not files:
        raise ArtifactError(
            f"{path} has no .txt or .md file", "a folder of problems has one prompt a file", code="no-problems"
        )
    for file in files:
        with _translated(file):
            yield from ((where, row) for where, row in _read_document(file) if row["question"].strip())


def _lines(path: Path) -> Iterator[tuple[str, str | ArtifactError]]:
    """Yield (place, line) of each line that says something, or an error for one that is too long."""
    with _open_text(path) as text:
        number = 0
        while line := text.readline(_MAX_TEXT):
            number += 1
            where = f"{path}:{number}"
            if len(line) == _MAX_TEXT and not line.endswith("\n"):
                while (rest := text.readline(_MAX_TEXT)) and not rest.endswith("\n"):
                    pass
                yield where, _too_long(where)
            elif line.strip():
                yield where, line


def _read_json_lines(path: Path) -> Iterator[tuple[str, Row]]:
    for where, line in _lines(path):
        yield where, _json_row(line, where) if isinstance(line, str) else line


def _json_row(line: str, where: str) -> Row:
    hint = "mend that line: a file of problems has one JSON object a line"
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        fault = f"{error.msg.removesuffix(' at')} at column {error.colno}"
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        fault = str(error)
    else:
        if isinstance(row, dict):
            return row
        return ArtifactError(f"{where} is not a JSON object", hint, code="line-broken")
    return ArtifactError(f"{where} is not JSON: {fault}", hint, code="line-broken")


def _read_json(path: Path) -> Iterator[tuple[str, Row]]:
    """Yield the objects of a JSON list, or of the first list of objects in a JSON object (`{"data": […]}`)."""
    with _open_bytes(path) as file:
        document = file.read(_MAX_DOCUMENT + 1)
    if len(document) > _MAX_DOCUMENT:
        hint = "convert it to .jsonl, which is read line by line"
        raise ArtifactError(f"{path} has more than {_MAX_DOCUMENT >> 20} MiB", hint, code="file-too-large")
    try:
        found = json.loads(document.decode(encoding_of(path)))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if isinstance(found, dict):
        found = next((value for value in found.values() if isinstance(value, list) and value), [found])
    for number, row in enumerate(found if isinstance(found, list) else [found], 1):
        where = f"{path} row {number}"
        fault = ArtifactError(f"{where} is not a JSON object", "mend or remove that row", code="line-broken")
        yield where, row if isinstance(row, dict) else fault


def _read_csv(path: Path) -> Iterator[tuple[str, Row]]:
    """Yield the rows of a table whose header says what separates its fields: commas, semicolons or tabs."""
    csv.field_size_limit(_MAX_TEXT)
    with _open_text(path) as text:
        header = text.readline(_MAX_TEXT)
        text.seek(0)
        separator = max(",;\t", key=header.count)
        reader = csv.DictReader(text, strict=True, delimiter=separator)
        for row in reader:
            where = f"{path}:{reader.line_num}"
            if None in row:
                fault = f"{where} has more fields than the header"
                hint = "quote fields that contain the separator or line breaks"
                yield where, ArtifactError(fault, hint, code="too-many-fields")
            else:
                yield where, row


def _read_parquet(path: Path) -> Iterator[tuple[str, Row]]:
    """Yield the rows of a Parquet file, one in memory at a time, whatever its compression holds."""
    import pyarrow
    import pyarrow.compute
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        groups = [file.metadata.row_group(i).total_byte_size for i in range(file.metadata.num_row_groups)]
        if max(groups, default=0) > _MAX_GROUP:
            hint = "write it again with smaller row groups"
            raise ArtifactError(
                f"a row group of {path} has more than {_MAX_GROUP >> 20} MiB", hint, code="file-too-large"
            )
        texts = [field.name for field in file.schema_arrow if pyarrow.types.is_string(field.type)]
    number = 0
    with pyarrow.parquet.ParquetFile(path, read_dictionary=texts) as file:  # a text that rows share is there once
        for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE):
            is_small = _longest(pyarrow, batch) <= _SHORT_TEXT
            for part in [batch] if is_small else (batch.slice(i, 1) for i in range(batch.num_rows)):
                is_long = not is_small and _longest(pyarrow, part) > _MAX_TEXT
                for row in [None] if is_long else part.to_pylist():
                    number += 1
                    where = f"{path} row {number}"
                    yield where, _too_long(where) if row is None else row


def _longest(pyarrow: Any, batch: Any) -> int:
    """Return the bytes of the longest text in the columns that have their texts in dictionaries."""
    sizes = [
        pyarrow.compute.max(pyarrow.compute.binary_length(column.dictionary.take(column.indices.unique()))).as_py() or 0
        for column in batch.columns
        if pyarrow.types.is_dictionary(column.type)
    ]
    return max(sizes, default=0)


def _too_long(where: str) -> ArtifactError:
    fault = f"{where} has more than {_MAX_TEXT:,} characters"
    return ArtifactError(fault, "split it, or remove it", code="line-too-long")


def _read_prompts(path: Path) -> Iterator[tuple[str, Row]]:
    for where, line in _lines(path):
        yield where, {"question": line.strip()} if isinstance(line, str) else line


def _read_document(path: Path) -> Iterator[tuple[str, Columns]]:
    with _open_text(path) as text:
        yield str(path), {"question": text.read(_MAX_TEXT).strip()}


_READERS: dict[str, Callable[[Path], Iterator[tuple[str, Row]]]] = {
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_prompts,
    ".md": _read_document,
}
