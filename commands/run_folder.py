"""A run folder as the commands take it: its recipe, and its student's GGUF with that recipe inside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from .. import __version__
from ..errors import UsageError

if TYPE_CHECKING:
    from ..distill.recipe.teach import TeachRecipe
    from ..localrun.core.reporter import Reporter
    from ..quantize.report import QuantizeReport


def run_of(path: Path) -> tuple[Path | None, TeachRecipe | None]:
    """Return (run folder, its settings) if a path is a run folder or its student, else (None, None)."""
    if not any((folder / "recipe.json").is_file() for folder in (path, path.parent)):
        return None, None  # nothing to import a stage for
    from ..distill.recipe.teach import TeachRecipe
    from ..distill.run import find_run

    folder = find_run(path)
    return folder, TeachRecipe.of_run(folder) if folder else None


def export_gguf(
    checkpoint: Path,
    target: Path,
    *,
    type_: str,
    recipe: TeachRecipe | None,
    report: Reporter,
    proofs: bool = True,
) -> QuantizeReport:
    """Quantize a checkpoint, with the run's recipe in its metadata, and prove it on test questions."""
    from ..quantize.release import quantize as run_quantize

    made = run_quantize(checkpoint, target, ftype=type_, metadata=metadata_of(recipe), report=report)
    return made.proved(questions_of(None, recipe), report=report) if proofs else made


def metadata_of(recipe: TeachRecipe | None) -> dict[str, str | int | float | bool]:
    """Return what a GGUF says of the version and the run that made it."""
    kept = {"deepdistill.recipe": json.dumps(recipe.to_json())} if recipe else {}
    return {"deepdistill.version": __version__, **kept}


def questions_of(problems: str | None, recipe: TeachRecipe | None) -> list[str]:
    """Return some test questions of a spec or of the run, or plain sums where there is neither or no way to it."""
    spec = problems or (recipe.problems if recipe else None)
    try:
        from ..distill.problems.load import load_problems

        if spec is not None:
            return [p.question for p in load_problems(spec, "test", n=20, seed=recipe.seed if recipe else 0)]
    except ImportError:  # the quantize extra alone
        if problems:
            hint = "pip install 'deepdistill[teach]'"
            raise UsageError(f"{problems} needs the teach extra", hint, code="not-installed") from None
    return [f"What is {3 * i + 2} + {7 * i + 5}?" for i in range(1, 21)]
