"""A run folder as the commands take it: its recipe, and its student's GGUF with that recipe inside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from .. import __version__
from ..errors import UsageError

if TYPE_CHECKING:
    from ..distill.recipe import TeachRecipe
    from ..localrun.core.reporter import Bars
    from ..quantize.report import QuantizeReport


def run_of(path: Path) -> tuple[Path | None, TeachRecipe | None]:
    """Return (run folder, its settings) if a path is a run folder or its student, else (None, None)."""
    if not any((folder / "recipe.json").is_file() for folder in (path, path.parent)):
        return None, None  # nothing to import a stage for
    from ..distill.recipe import TeachRecipe
    from ..distill.run import find_run

    folder = find_run(path)
    return folder, TeachRecipe.of_run(folder) if folder else None


def export_gguf(
    checkpoint: Path,
    target: Path,
    type_: str,
    problems: str | None,
    settings: TeachRecipe | None,
    progress: Bars,
    proofs: bool = True,
) -> QuantizeReport:
    """Quantize a checkpoint, with the run's recipe in its metadata, and prove it on test questions."""
    from ..quantize.release import quantize as run_quantize

    report = run_quantize(checkpoint, target, ftype=type_, metadata=metadata_of(settings), report=progress)
    return report.proved(questions_of(problems, settings), report=progress) if proofs else report


def metadata_of(settings: TeachRecipe | None) -> dict[str, str | int | float | bool]:
    """Return what a GGUF says of the version and the run that made it."""
    recipe = {"deepdistill.recipe": json.dumps(settings.to_json())} if settings else {}
    return {"deepdistill.version": __version__, **recipe}


def questions_of(problems: str | None, settings: TeachRecipe | None) -> list[str]:
    """Return some test questions of a spec or of the run, or plain sums where there is neither or no way to it."""
    spec = problems or (settings.problems if settings else None)
    try:
        from ..distill.problems.load import load_problems

        if spec is not None:
            return [p.question for p in load_problems(spec, "test", n=20, seed=settings.seed if settings else 0)]
    except ImportError:  # the quantize extra alone
        if problems:
            raise UsageError(f"{problems} takes the teach extra", "pip install 'deepdistill[teach]'") from None
    return [f"What is {3 * i + 2} + {7 * i + 5}?" for i in range(1, 21)]
