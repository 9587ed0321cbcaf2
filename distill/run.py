"""The run folder: one recipe, its artifacts, and a lock so that one process at a time works in it."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from ..errors import ArtifactError
from ..localrun.core.append_file import WriterLock
from ..localrun.core.atomic import write_text
from ..localrun.core.settings import fields_of, get
from .recipe.gathering import AskingRecipe
from .recipe.teach import TeachRecipe

CLOCK_FILE = "clock.json"  # written last into a checkpoint: one without it was cut off


class Run:
    """A folder of a run, held while work goes on in it; use it as a context manager.

    The settings of the recipe that are not `fixed` may change until a training has a checkpoint: the traces that are
    there stay. As long as nothing was made by it, all of it may.

    Raises on entry:
        ArtifactError: `code` "file-locked": another process holds it, which is named; "run-differs": it was made with
            another recipe; "run-has-link": a link in it might lead anywhere; "recipe-broken", "recipe-newer".
    """

    def __init__(self, folder: Path, recipe: TeachRecipe) -> None:
        self.folder, self._recipe = folder, recipe
        self.traces_path = folder / "traces.jsonl"
        self.checkpoints_dir = folder / "checkpoints"
        self.student_dir = folder / "student"
        self.report_path = folder / "report.html"
        self._lock: WriterLock | None = None

    def __enter__(self) -> Self:
        if os.path.lexists(self.folder) and not self.folder.is_dir():
            raise ArtifactError(f"{self.folder} is not a folder", "give another one with --out", code="out-is-file")
        make_run_folder(self.folder)
        lock = WriterLock(self.folder / "recipe.json", what=self.folder)
        try:
            self._check_recipe()
        except BaseException:
            lock.release()
            raise
        self._lock = lock
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.release()

    @property
    def is_trained(self) -> bool:
        """Whether a training has come to a checkpoint: from then on it has the rows and settings that it has."""
        return self.student_dir.exists() or any(self.checkpoints_dir.glob(f"checkpoint-*/{CLOCK_FILE}"))

    def first_student_dir(self, n_rounds: int) -> Path:
        """Return where the student of the first training stands: apart if on-policy rounds follow."""
        return self.folder / "rounds" / "0" / "student" if n_rounds else self.student_dir

    def drop_checkpoints(self) -> None:
        """Delete the checkpoints of all trainings of a run that has its student: nothing later reads them."""
        assert self.student_dir.exists(), "a training without its checkpoints would start over"
        for folder in (self.checkpoints_dir, *self.folder.glob("rounds/*/checkpoints")):
            for checkpoint in folder.glob("checkpoint-*"):
                shutil.rmtree(checkpoint, ignore_errors=True)

    def holds_work(self) -> bool:
        """Say whether anything was made by the recipe: what failed before the first answer leaves nothing."""
        others = (p for p in self.folder.iterdir() if p.name not in ("recipe.json", "failures.jsonl"))
        return any(p.is_dir() or p.stat().st_size for p in others if not p.name.startswith("."))

    def _check_recipe(self) -> None:
        record = self._recipe.to_json()
        kept = self.load("recipe.json") if self.holds_work() else None
        if kept is not None:
            before = TeachRecipe.from_json(kept, str(self.folder / "recipe.json"))
            changed = [
                (leaf, get(before, leaf.path), get(self._recipe, leaf.path))
                for leaf in fields_of(TeachRecipe)
                if leaf.path[0] in record and get(before, leaf.path) != get(self._recipe, leaf.path)
            ]
            fixed = [one for one in changed if self.is_trained or one[0].flag.fixed]
            if fixed:
                was = ", ".join(f"{leaf.key} was {_shown(old)}, is {_shown(new)}" for leaf, old, new in fixed[:3])
                hint = "give another folder with --out, or the same settings"
                if not any(leaf.flag.fixed for leaf, _, _ in fixed):
                    hint += f"; to train anew on more traces, delete student/ and checkpoints/ in {self.folder}"
                raise ArtifactError(f"{self.folder} holds a run with another recipe: {was}", hint, code="run-differs")
        if kept != record:
            if not self.is_trained:
                shutil.rmtree(self.checkpoints_dir, ignore_errors=True)  # a plan at most, made by the other settings
            self.save("recipe.json", record)

    def load(self, name: str) -> Any:
        """Return a JSON artifact of the run, or None if there is none yet."""
        path = self.folder / name
        try:
            return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        except (OSError, ValueError) as error:
            hint = "move it away to have it made again"
            raise ArtifactError(f"{path} is broken: {error}", hint, code="artifact-broken") from error

    def save(self, name: str, value: Any) -> None:
        """Write a JSON artifact beside its place and rename it."""
        write_text(self.folder / name, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def settled(recipe: TeachRecipe, folder: Path) -> TeachRecipe:
    """Return a recipe for a folder: a run of an older version that is there keeps its graders.

    Raises:
        ArtifactError: `code` "recipe-broken" or "recipe-newer".
    """
    run = Run(folder, recipe)
    kept = run.load("recipe.json") if folder.is_dir() and run.holds_work() else None
    if kept is None or recipe.asking != AskingRecipe(recipe.asking.instruction):
        return recipe
    before = TeachRecipe.from_json(kept, str(folder / "recipe.json"))
    return replace(recipe, asking=replace(recipe.asking, graders=before.asking.graders))


def make_run_folder(folder: Path) -> None:
    """Make a folder for a run, which nobody else may read, or check the one that is there.

    Raises:
        ArtifactError: `code` "write-failed", or "run-has-link": a link in it might lead anywhere.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise ArtifactError(f"cannot make {folder}: {error.strerror}", code="write-failed") from error
    if link := next((path for path in folder.rglob("*") if path.is_symlink()), None):
        hint = "put what it points to in its place, or give another folder with --out"
        raise ArtifactError(f"{link} is a link, and a run follows none", hint, code="run-has-link")


def find_run(path: Path) -> Path | None:
    """Return the run folder that a path is, or that it is the student of; None if neither."""
    folder = path.parent if path.name == "student" else path
    return folder if (folder / "recipe.json").is_file() else None


def run_name(student: str, problems: str) -> str:
    """Return a run's name from what it teaches: `smollm2-chain_sum`."""
    subject = Path(problems.partition("?")[0].removeprefix("gym:")).stem
    pupil = Path(student.removeprefix("hf:")).name
    return re.sub(r"[^A-Za-z0-9._-]+", "-", f"{pupil}-{subject}").strip("-")


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}…"
