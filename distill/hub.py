"""Downloads from the Hugging Face hub, and its errors in our words: a student's checkpoint, a split of a data set.

Everything comes through the hub's own cache, so that `--offline` finds what an earlier run downloaded.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..errors import ArtifactError, ModelError, UsageError
from ..localrun.core.text import first_line

_CHECKPOINT_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "README.md", "LICENSE*"]
_TABLES = (".parquet", ".jsonl", ".ndjson", ".csv")
_CONVERTED = "refs/convert/parquet"  # the hub's own conversion of a data set, as CONFIG/SPLIT/0000.parquet


def download_checkpoint(repository: str, *, offline: bool) -> Path:
    """Return the local folder of a model's checkpoint, without weights in other formats than safetensors.

    Raises:
        ModelError: `code` "not-in-cache" or "hub-failed".
    """
    from huggingface_hub import snapshot_download

    with _translated(ModelError, repository, offline=offline):
        return Path(snapshot_download(repository, local_files_only=offline, allow_patterns=_CHECKPOINT_FILES))


def download_split(repository: str, *, split: str, config: str | None, offline: bool) -> list[Path]:
    """Return the local files of one split of a data set, in order.

    Raises:
        UsageError: `code` "no-such-split"; "several-configs" if only a config tells which files are meant.
        ArtifactError: `code` "not-in-cache", "hub-failed", or "split-incomplete" if the cache lacks some of the files.
    """
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    with _translated(ArtifactError, f"the data set {repository}", offline=offline):
        if chosen := _files_of(repository, None, split=split, config=config, offline=offline):
            return chosen
        with suppress(HfHubHTTPError, LocalEntryNotFoundError):
            if chosen := _files_of(repository, _CONVERTED, split=split, config=config, offline=offline):
                return chosen
    raise UsageError(
        f"{repository} has no {' or '.join(_TABLES)} file of the split {split!r}"
        + (f" and the config {config!r}" if config else "")
        + (" in the cache" if offline else ""),
        "name the split and the config: hf:ORG/NAME?split=test&config=main",
        code="no-such-split",
    )


def choose_files(names: Iterable[str], split: str, config: str | None) -> list[str]:
    """Return the files of one split and config by their names: `data/train-00000-of-00002.parquet`, `main/test.jsonl`.

    Raises:
        UsageError: `code` "several-configs": several configs have files of this split.
    """
    tables = sorted(name for name in names if name.lower().endswith(_TABLES))
    word = re.compile(rf"(?:^|[/_.-]){re.escape(split)}(?:[/_.-]|$)")
    chosen = [name for name in tables if word.search(name)]
    if config is not None:
        token = re.compile(rf"(?:^|[/_.-]){re.escape(config)}(?:[/_.-]|$)")
        chosen = [name for name in chosen if token.search(name)]
    # One format, since the same rows in two formats would come twice.
    formats = [[name for name in chosen if name.lower().endswith(kind)] for kind in _TABLES]
    chosen = next(filter(None, formats), [])
    stems = {re.sub(r"(?:-\d+-of-\d+|[/_-]?\d+)(?=\.\w+$)", "", name) for name in chosen}
    if len(stems) > 1:
        folders = sorted({name.rpartition("/")[0].split("/")[0] or name for name in stems})
        raise UsageError(
            f"several configs have a split {split!r}: {', '.join(folders[:8])}",
            "choose one with ?config=NAME",
            code="several-configs",
        )
    return chosen


def _files_of(repository: str, revision: str | None, *, split: str, config: str | None, offline: bool) -> list[Path]:
    """Download the files of a split at a revision and return their paths; an empty list if it has none."""
    from huggingface_hub import HfApi, snapshot_download

    where: dict[str, Any] = {"repo_id": repository, "repo_type": "dataset", "revision": revision}
    # The card comes along: offline, the hub's library finds a data set only if the file that is asked for is there.
    if offline:
        folder = Path(snapshot_download(**where, local_files_only=True, allow_patterns=["README.md"]))
        names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
        chosen = choose_files(names, split, config)
    else:
        chosen = choose_files(HfApi().list_repo_files(**where), split, config)
        folder = Path(snapshot_download(**where, allow_patterns=["README.md", *chosen]))
    _check_complete(chosen, repository)
    return [folder / name for name in chosen]


def _check_complete(names: list[str], repository: str) -> None:
    """Check that no numbered part is missing, as after a download that was cut short."""
    for name in names:
        numbered = re.search(r"-\d+-of-(\d+)\.", name)
        if numbered and int(numbered[1]) != len(names):
            raise ArtifactError(
                f"the cache has {len(names)} of the {int(numbered[1])} parts of {repository}",
                "run once without --offline",
                code="split-incomplete",
            )


@contextmanager
def _translated(kind: type[ArtifactError | ModelError], what: str, *, offline: bool) -> Iterator[None]:
    """Turn the hub's errors into one of ours that says what could not be had."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        yield
    except LocalEntryNotFoundError as error:
        if offline:
            hint = "it is not in the cache: run once without --offline"
            raise kind(f"cannot get {what} from the hub", hint, code="not-in-cache") from error
        raise kind(f"cannot get {what} from the hub", "check the network", code="hub-failed") from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        hint = "check the name; a gated repository needs HF_TOKEN"
        raise kind(f"cannot get {what} from the hub: {first_line(error)}", hint, code="hub-failed") from error
