"""Runs beside each other: those in a folder, two of them compared, and one deleted."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..errors import ArtifactError, UsageError
from ..localrun.core.append_file import WriterLock, is_locked
from ..localrun.core.settings import fields_of, get
from .evaluation.pairs import counts_of, pair_answers, read_answers
from .recipe.teach import TeachRecipe
from .run import Run, make_run_folder

_FOLDERS = {"student", "adapter", "checkpoints", "answers", "rounds"}
_SUFFIXES = {".json", ".jsonl", ".html", ".gguf", ".bin", ".md", ".svg", ".parquet", ".lock", ".part", ".pt"}
_ENDINGS = ("-healed", ".part")  # of folders: sources of a healed file, and what a killed process was writing


@dataclass(frozen=True)
class RunSummary:
    """One run in a list. `stage` is how far it came, `base` and `accuracy` are shares, None where nothing is scored."""

    folder: Path
    student: str
    problems: str
    stage: str
    is_at_work: bool
    base: float | None
    accuracy: float | None
    n_bytes: int
    changed: str  # ISO 8601


@dataclass(frozen=True)
class RunComparison:
    """Two runs: the settings that differ, every hop's score in both, and how their students' answers differ.

    `answers` counts the problems that both students answered by their state, from the first run to the second.
    """

    settings: dict[str, tuple[Any, Any]]
    hops: dict[str, tuple[dict[str, Any] | None, dict[str, Any] | None]]
    answers: dict[str, int]


def list_runs(folder: Path) -> list[RunSummary]:
    """Return the runs that lie in a folder, the newest first; what is not a run, or no longer readable, is left out."""
    found = (path.parent for path in folder.glob("*/recipe.json") if not path.parent.is_symlink())
    return sorted(_summaries(found), key=lambda run: run.changed, reverse=True)


def _summaries(folders: Iterator[Path]) -> Iterator[RunSummary]:
    for folder in folders:
        try:
            recipe = TeachRecipe.of_run(folder)
            scores = Run(folder, recipe).load("scores.json") or {}
            files = [path.lstat() for path in folder.rglob("*") if not path.is_dir()]
            newest = datetime.fromtimestamp(max(file.st_mtime for file in files), UTC)
            yield RunSummary(
                folder=folder,
                student=recipe.student,
                problems=recipe.problems,
                stage=_stage(folder, scores),
                is_at_work=is_locked(folder / "recipe.json"),
                base=scores.get("base", {}).get("accuracy"),
                accuracy=scores.get("student", {}).get("accuracy"),
                n_bytes=sum(file.st_size for file in files),
                changed=newest.isoformat(timespec="seconds"),
            )
        except (ArtifactError, OSError):
            continue


def _stage(folder: Path, scores: dict[str, Any]) -> str:
    if any(folder.glob("*.gguf")):
        return "quantized"
    if "student" in scores:
        return "scored"
    if (folder / "student").is_dir():
        return "trained"
    if any(folder.glob("checkpoints/checkpoint-*")):
        return "training"
    return "traces" if (folder / "traces.jsonl").is_file() else "begun"


def compare_runs(first: Path, second: Path) -> RunComparison:
    """Return what differs between two runs.

    Raises:
        ArtifactError: `code` "no-run"; "recipe-broken", "recipe-newer", "artifact-broken".
    """
    folders = [run_folder(path) for path in (first, second)]
    recipes = [TeachRecipe.of_run(folder) for folder in folders]
    scores = [Run(folder, recipe).load("scores.json") or {} for folder, recipe in zip(folders, recipes, strict=True)]
    answers = [read_answers(folder / "answers" / "student.jsonl") for folder in folders]
    pairs = pair_answers(*answers)
    both = {leaf.key: (get(recipes[0], leaf.path), get(recipes[1], leaf.path)) for leaf in fields_of(TeachRecipe)}
    return RunComparison(
        settings={key: values for key, values in both.items() if values[0] != values[1]},
        hops={hop: (scores[0].get(hop), scores[1].get(hop)) for hop in {**scores[0], **scores[1]}},
        answers=counts_of(pairs),
    )


def run_folder(path: Path) -> Path:
    """Return a path if it is a run folder.

    Raises:
        ArtifactError: `code` "no-run": it is not one, or it is a link.
    """
    if path.is_symlink() or not (path / "recipe.json").is_file():
        raise ArtifactError(f"{path} is not a run folder", "`deepdistill runs` lists them", code="no-run")
    return path


def check_deletable(path: Path) -> None:
    """Check that a folder is a run and holds nothing else, and that nothing in it leads anywhere else.

    Raises:
        ArtifactError: `code` "no-run"; "not-of-run": something in it is no artifact; "run-has-link"; "recipe-broken".
        UsageError: `code` "folder-in-use": the command was started inside it.
    """
    TeachRecipe.of_run(run_folder(path))
    make_run_folder(path)
    if Path.cwd().is_relative_to(path.resolve()):
        raise UsageError(f"this command was started in {path}", "leave that folder first", code="folder-in-use")
    for entry in path.iterdir():
        is_ours = entry.name in _FOLDERS or entry.name.endswith(_ENDINGS)
        if not (is_ours if entry.is_dir() else entry.suffix in _SUFFIXES):
            hint = "move it away, or delete the folder yourself"
            raise ArtifactError(f"{entry} is nothing that a run makes", hint, code="not-of-run")


def delete_run(path: Path) -> None:
    """Delete a run folder with all that is in it.

    Raises:
        ArtifactError: see `check_deletable`; `code` "file-locked": a process works in it; "delete-failed".
        UsageError: see `check_deletable`.
    """
    check_deletable(path)
    lock = WriterLock(path / "recipe.json", what=path)
    try:
        for entry in path.iterdir():  # what makes it a run goes last: what is left of it can be deleted again
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.suffix != ".lock" and entry.name != "recipe.json":
                entry.unlink()
        lock.release()  # Windows deletes no open file
        shutil.rmtree(path)
    except OSError as error:
        raise ArtifactError(f"cannot delete {path}: {error.strerror or error}", code="delete-failed") from error
    finally:
        lock.release()
