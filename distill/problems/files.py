"""Rows of problems from a file, a folder of prompts, or a data set on the Hugging Face hub.

A row is a mapping of columns. Prompts without columns (a line of a .txt file, a whole .md file, each .txt or .md file
of a folder) are rows with a question alone.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import ArtifactError, UsageError

Row = Mapping[str, Any]

_TABLES = (".parquet", ".jsonl", ".ndjson", ".csv")
_PROMPTS = (".txt", ".md")
_CONVERTED = "refs/convert/parquet"  # the hub's own conversion, as CONFIG/SPLIT/0000.parquet


def read_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """Yield (where it stands, the row) from a file, by its suffix, or from a folder of prompts.

    Raises:
        UsageError: the suffix says nothing.
        ArtifactError: the file is missing or broken, or the folder holds no prompt.
    """
    if path.is_dir():
        yield from _folder(path)
        return
    if not path.is_file():
        raise ArtifactError(
            f"no problem file at {path}",
            "problems are gym:NAME?param=value, hf:ORG/NAME, a .jsonl, .csv, .parquet or .txt file, or a folder",
        )
    suffix = path.suffix.lower()
    try:
        if suffix in (".jsonl", ".ndjson"):
            yield from _json_lines(path)
        elif suffix == ".csv":
            with path.open(encoding="utf-8-sig", newline="") as lines:
                for number, row in enumerate(csv.DictReader(lines, strict=True), 2):
                    yield f"{path}:{number}", row
        elif suffix == ".parquet":
            yield from _parquet(path)
        elif suffix == ".txt":
            with path.open(encoding="utf-8-sig") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        yield f"{path}:{number}", {"question": line.strip()}
        elif suffix == ".md":
            yield str(path), {"question": path.read_text(encoding="utf-8-sig")}
        else:
            raise UsageError(
                f"cannot tell what {path} is",
                "problem files end in .jsonl, .csv, .parquet, .txt or .md",
            )
    except (ValueError, csv.Error) as error:  # json, unicode and pyarrow errors are ValueErrors
        raise ArtifactError(f"{path} is broken: {error}") from error
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error}") from error


def read_hub(
    repository: str, split: str = "train", config: str | None = None, offline: bool = False
) -> Iterator[tuple[str, Row]]:
    """Yield (where it stands, the row) of one split of a data set on the hub; offline from the cache alone.

    Raises:
        UsageError: there is no such split, or it takes a config to tell which files are meant.
        ArtifactError: the data set cannot be had, or not all of it is in the cache.
    """
    for path in _download(repository, split, config, offline):
        for _, row in read_rows(path):
            yield f"hf:{repository} {path.name}", row


def choose_files(names: Iterable[str], split: str, config: str | None) -> list[str]:
    """Return the files of one split and config by their names: `data/train-00000-of-00002.parquet`, `main/test.jsonl`.

    Raises:
        UsageError: several configs have files of this split.
    """
    tables = sorted(name for name in names if name.lower().endswith(_TABLES))
    word = re.compile(rf"(?:^|[/_.-]){re.escape(split)}(?:[/_.-]|$)")
    chosen = [name for name in tables if word.search(name)]
    if config is not None:
        token = re.compile(rf"(?:^|[/_.-]){re.escape(config)}(?:[/_.-]|$)")
        chosen = [name for name in chosen if token.search(name)]
    # One format is enough, and of the same rows in two formats one would come twice.
    formats = [[name for name in chosen if name.lower().endswith(kind)] for kind in _TABLES]
    chosen = next(filter(None, formats), [])
    stems = {re.sub(r"(?:-\d+-of-\d+|[/_-]?\d+)(?=\.\w+$)", "", name) for name in chosen}
    if len(stems) > 1:
        folders = sorted({name.rpartition("/")[0].split("/")[0] or name for name in stems})
        raise UsageError(
            f"several configs have a split {split!r}: {', '.join(folders[:8])}", "choose one with ?config=NAME"
        )
    return chosen


def _download(repository: str, split: str, config: str | None, offline: bool) -> Sequence[Path]:
    """Return the local files of a split, in order."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        for revision in (None, _CONVERTED):
            where: dict[str, Any] = {"repo_id": repository, "repo_type": "dataset", "revision": revision}
            try:
                if offline:
                    folder = Path(snapshot_download(**where, local_files_only=True, allow_patterns=["README.md"]))
                    names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
                    chosen = choose_files(names, split, config)
                else:
                    names = HfApi().list_repo_files(**where)
                    chosen = choose_files(names, split, config)
                    # The card comes along: offline the library vouches for what is asked, and that it can always find.
                    folder = Path(snapshot_download(**where, allow_patterns=["README.md", *chosen]))
            except (HfHubHTTPError, LocalEntryNotFoundError):
                if revision is None:
                    raise
                break  # no conversion there
            if chosen:
                return [folder / name for name in _complete(chosen, repository)]
    except LocalEntryNotFoundError as error:
        hint = "it is not in the cache: run once without --offline" if offline else "check the network"
        raise ArtifactError(f"cannot get the data set {repository}", hint) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ArtifactError(
            f"cannot get the data set {repository}: {first}", "check the name; gated data sets need HF_TOKEN"
        ) from error
    raise UsageError(
        f"{repository} has no {' or '.join(_TABLES)} file of the split {split!r}"
        + (f" and the config {config!r}" if config else "")
        + (" in the cache" if offline else ""),
        "name them: hf:ORG/NAME?split=test&config=main",
    )


def _complete(names: list[str], repository: str) -> list[str]:
    """Check that no numbered part is missing, as after a download that was cut short."""
    for name in names:
        numbered = re.search(r"-\d+-of-(\d+)\.", name)
        if numbered and int(numbered[1]) != len(names):
            raise ArtifactError(
                f"{len(names)} of the {int(numbered[1])} parts of {repository} are there",
                "run once without --offline",
            )
    return names


def _folder(path: Path) -> Iterator[tuple[str, Row]]:
    """Yield each .txt and .md file of a folder as a prompt, in the order of their names."""
    files = sorted(
        file
        for file in path.rglob("*")
        if file.suffix.lower() in _PROMPTS
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    )
    if not files:
        raise ArtifactError(f"{path} holds no .txt or .md file", "a folder of problems holds one prompt a file")
    for file in files:
        try:
            text = file.read_text(encoding="utf-8-sig").strip()
        except ValueError as error:
            raise ArtifactError(f"{file} is no UTF-8 text", "convert it, or move it away") from error
        except OSError as error:
            raise ArtifactError(f"cannot read {file}: {error}") from error
        if text:
            yield str(file), {"question": text}


def _json_lines(path: Path) -> Iterator[tuple[str, Row]]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    why = f"{error.msg.removesuffix(' at')} at column {error.colno}"
                    raise ArtifactError(
                        f"{path}:{number} is no JSON: {why}", "mend that line: one JSON object a line"
                    ) from error
                if not isinstance(row, dict):
                    raise ArtifactError(f"{path}:{number} is not a JSON object")
                yield f"{path}:{number}", row


def _parquet(path: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow.parquet

    number = 0
    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=1000):
            for row in batch.to_pylist():
                number += 1
                yield f"{path} row {number}", row
