"""`deepdistill quantize`."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ArtifactError, GateError, UsageError
from ..quantize.recipe import QuantizeRecipe
from .declared import declared
from .run_folder import metadata_of, questions_of, run_of
from .shared import AsJson, Quiet, bars, tell

if TYPE_CHECKING:
    from ..distill.recipe.teach import TeachRecipe
    from ..localrun.core.reporter import Reporter
    from ..quantize.measure.paired import Answers
    from ..quantize.release import DistillStage


def run(
    recipe: QuantizeRecipe,
    student: Annotated[
        Path | None, typer.Argument(help="A run folder, or a Hugging Face checkpoint folder or adapter.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="The file to write. Beside the student, unless given.", metavar="FILE", rich_help_panel="File"
        ),
    ] = None,
    verify: Annotated[
        Path | None,
        typer.Option(
            help="Make this file again from its sources and compare; nothing is written.",
            metavar="FILE",
            rich_help_panel="Measurements",
        ),
    ] = None,
    json_output: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Make a GGUF of a student, and measure what quantizing loses.

    The types of its tensors come from a mixture, or from measurements where a size is given. A gate says what has to
    hold, or no file is written; proofs compare the file with the checkpoint.
    """
    if verify is not None:
        _verify(verify, student, recipe=recipe, json_output=json_output, quiet=quiet)
        return
    if student is None:
        raise UsageError("which student?", "give a run folder or a checkpoint folder", code="no-student")
    from ..quantize.release import release

    folder, taught = run_of(student)
    checkpoint = folder / "student" if folder else student
    if folder and not checkpoint.is_dir():
        hint = f"deepdistill teach --out {folder} … makes one"
        raise ArtifactError(f"{folder} holds no trained student", hint, code="no-student")
    recipe = replace(recipe, traces=recipe.traces or _traces_of(folder, taught))
    questions = questions_of(recipe.problems, taught) if recipe.proofs else []
    with bars(quiet) as progress:
        made = release(
            checkpoint,
            _path_of(recipe, checkpoint, folder=folder, out=out),
            settings=recipe,
            stage=_stage(recipe, taught, report=progress),
            metadata=metadata_of(taught),
            report=progress,
        )
        report = made.report.proved(questions, report=progress) if recipe.proofs else made.report
    tell(f"{report.path}: {report.n_bytes / 1e6:.1f} MB, {report.bits_per_weight:.2f} bits per weight")
    tell(*report.summary(), *made.summary())
    tell(f"next: deepdistill chat {report.path}")
    if json_output:
        measured = {key: value for key, value in dataclasses.asdict(made).items() if key != "report"}
        print(json.dumps(dataclasses.asdict(report) | measured, default=str))
    if report.proofs and report.proofs.failed:
        hint = "the proofs above say where they differ"
        raise GateError(f"{report.path} does not do what its checkpoint does", hint, code="proofs-failed")


def _path_of(recipe: QuantizeRecipe, checkpoint: Path, *, folder: Path | None, out: Path | None) -> Path:
    """Return the file to write: named after the student and what chose its types."""
    kind = recipe.target or recipe.type
    if recipe.size is not None:
        kind = f"{recipe.size / 1e6:g}MB"
    elif recipe.bpw is not None:
        kind = f"{recipe.bpw:g}bpw"
    name = f"{checkpoint.resolve().name}-{kind}.gguf"
    if out is None:
        return (folder or checkpoint.resolve().parent) / name
    return out / name if out.is_dir() else out


def _stage(recipe: QuantizeRecipe, taught: TeachRecipe | None, *, report: Reporter) -> DistillStage:
    """Return what the distill stage lends to a release: provenance, questions to ask, the loss of healing."""
    from ..quantize.measure.gate import Gate
    from ..quantize.release import DistillStage

    n = recipe.n or (200 if recipe.gate and Gate.parse(recipe.gate).needs_answers else 0)
    spec = recipe.problems or (taught.problems if taught else None)
    if n and spec is None:
        raise UsageError("there are no problems to ask", "give --problems", code="no-problems")
    ask = _asking(spec, taught, n=n, report=report) if spec and n else None
    return DistillStage(
        {"teacher": taught.teacher.model, "problems": taught.problems} if taught else {},
        evaluate=ask,
        problems=f"{n} of {spec}, seed {taught.seed if taught else 0}" if ask else "",
        divergence=_divergence() if recipe.heal.steps else None,
    )


def _verify(path: Path, student: Path | None, *, recipe: QuantizeRecipe, json_output: bool, quiet: bool) -> None:
    """Make a file again from its sources and compare."""
    from ..quantize.verify import verify as run_verify

    folder, _ = run_of(student) if student else (None, None)
    with bars(quiet) as progress:
        found = run_verify(
            path,
            folder / "student" if folder else student,
            imatrix_path=Path(recipe.imatrix) if recipe.imatrix else None,
            base=recipe.base,
            report=progress,
        )
    tell(*found.summary())
    if json_output:
        print(json.dumps(dataclasses.asdict(found) | {"holds": found.holds}))
    if not found.holds:
        raise GateError(f"{path} is not what its sources make", "the lines above say what differs", code="not-verified")


def _asking(spec: str, taught: TeachRecipe | None, *, n: int, report: Reporter) -> Callable[[Path], Answers]:
    """Return what asks a GGUF the same n test problems each time, and says which it got right."""
    from ..distill.evaluation.evaluate import score_file, unclear
    from ..distill.problems.load import load_problems
    from ..distill.recipe.teach import ScoresRecipe
    from ..quantize.measure.paired import Answers

    asking = taught.asking if taught else None
    held_out = load_problems(spec, "test", n=n, seed=taught.seed if taught else 0, asking=asking, report=report)
    max_tokens = (taught.scores if taught else ScoresRecipe()).max_tokens

    def ask(path: Path) -> Answers:
        with tempfile.TemporaryDirectory() as folder:
            answers = Path(folder) / "answers.jsonl"
            score = score_file(path, held_out, max_tokens=max_tokens, answers_path=answers, report=report)
            lines = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
        if text := unclear(vars(score)):
            report.say(f"{path.name}: {text}")
        right = tuple(line["verdict"] == "right" for line in lines)
        return Answers(right, score.closed, score.looped, score.n_unknown / score.n)

    return ask


def _traces_of(folder: Path | None, taught: TeachRecipe | None) -> Path | None:
    """Return a run's traces, where it keeps them or where it was given them."""
    found = [
        folder / "traces.jsonl" if folder else None,
        taught.traces.file if taught else None,
    ]
    return next((path for path in found if path and path.is_file()), None)


def _divergence() -> Callable[..., Any]:
    """Return the loss of healing."""
    try:
        from ..distill.training.losses import projected_kl
    except ImportError as error:
        hint = "pip install 'deepdistill[teach]'"
        raise UsageError("--heal needs torch", hint, code="not-installed") from error
    return projected_kl


QuantizeCommand, quantize = declared(QuantizeRecipe, run)
