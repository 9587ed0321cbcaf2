"""`deepdistill quantize`."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..errors import ArtifactError, GateError, UsageError
from .runs import metadata_of, questions_of, run_of
from .shared import AsJson, Quiet, bars

if TYPE_CHECKING:
    from ..distill.recipe import TeachRecipe
    from ..localrun.core.reporter import Bars
    from ..quantize.measure.paired import Answers


def quantize(
    student: Annotated[
        Path | None, typer.Argument(help="A run folder, or a Hugging Face checkpoint folder or adapter.")
    ] = None,
    type_: Annotated[
        str,
        typer.Option("--type", help="F32 F16 BF16 Q8_0 Q6_K Q5_K_M Q4_K_M Q4_0 IQ4_XS Q3_K_M Q2_K …: a recipe."),
    ] = "Q8_0",
    size: Annotated[str | None, typer.Option(help="90MB: the best types for a file of at most this.")] = None,
    bpw: Annotated[float | None, typer.Option(help="4.5: the best types for at most so many bits a weight.")] = None,
    target: Annotated[
        Literal["phone", "laptop"] | None, typer.Option(help="The best types for such a machine's memory and speed.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The file to write; beside the student if not given.")] = None,
    base: Annotated[Path | None, typer.Option(help="An adapter's base; what it names if not given.")] = None,
    traces: Annotated[
        Path | None, typer.Option(help="What to measure with: a traces.jsonl; the run's own if not given.")
    ] = None,
    imatrix: Annotated[
        str | None, typer.Option(help="An importance matrix (GGUF), or none; made from the traces if not given.")
    ] = None,
    fidelity: Annotated[bool, typer.Option(help="Measure the file against the unquantized model.")] = True,
    compare: Annotated[
        str | None, typer.Option(help="Q4_K_M,Q4_0: recipes to measure beside the file, for the table and the plot.")
    ] = None,
    gate: Annotated[
        str | None, typer.Option(help="'accuracy >= 0.98 of bf16, loops <= 1%': else no file, and exit 3.")
    ] = None,
    promote: Annotated[
        bool, typer.Option("--promote", help="Raise the worst tensors until the gate is met or --size is reached.")
    ] = False,
    heal: Annotated[int, typer.Option(help="Steps of distillation under the file's types; needs torch.", min=0)] = 0,
    problems: Annotated[
        str | None, typer.Option(help="Whose test questions are asked; the run's own if not given.")
    ] = None,
    n: Annotated[int, typer.Option("--n", help="Test problems to ask file and unquantized model.", min=0)] = 0,
    proofs: Annotated[bool, typer.Option(help="Prove the file against the checkpoint after writing it.")] = True,
    split: Annotated[str | None, typer.Option(help="500MB: parts of at most so many bytes of tensors.")] = None,
    verify: Annotated[
        Path | None, typer.Option(help="Make this file again from its sources, and compare; nothing is written.")
    ] = None,
    json_output: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Student -> GGUF: types by recipe or by measurement under a size, what it kept, a gate, and proofs."""
    if verify is not None:
        _verify(verify, student, imatrix, base, json_output, quiet)
        return
    if student is None:
        raise UsageError("which student?", "give a run folder or a checkpoint folder")
    from ..quantize.convert.files import parse_size
    from ..quantize.measure.gate import Gate
    from ..quantize.recipe import ReleaseSettings
    from ..quantize.release import DistillStage, release

    folder, settings = run_of(student)
    checkpoint = folder / "student" if folder else student
    if folder and not checkpoint.is_dir():
        raise ArtifactError(f"{folder} holds no trained student", f"deepdistill teach --out {folder} … makes one")
    kind = size or (f"{bpw:g}bpw" if bpw else target) or type_.upper()
    name = f"{checkpoint.resolve().name}-{kind}.gguf"
    target_path = (out / name if out.is_dir() else out) if out else (folder or checkpoint.resolve().parent) / name
    held = Gate.parse(gate) if gate else None
    wanted = ReleaseSettings(
        type=type_,
        size=parse_size(size) if size else None,
        bpw=bpw,
        target=target,
        base=base,
        imatrix=imatrix,
        traces=traces or _traces_of(folder, settings),
        gate=held,
        promote=promote,
        heal=heal,
        fidelity=fidelity,
        compare=tuple(part.strip().upper() for part in (compare or "").split(",") if part.strip()),
        split=parse_size(split) if split else None,
    )
    n_asked = n or (200 if held and held.needs_answers else 0)
    spec = problems or (settings.problems if settings else None)
    if n_asked and spec is None:
        raise UsageError("there are no problems to ask", "give --problems")
    questions = questions_of(problems, settings) if proofs else []
    with bars(quiet) as progress:
        ask = _asking(spec, settings, n_asked, progress) if spec and n_asked else None
        recipe = {"teacher": settings.teacher.model, "problems": settings.problems} if settings else {}
        made = release(
            checkpoint,
            target_path,
            settings=wanted,
            stage=DistillStage(
                recipe,
                evaluate=ask,
                problems=f"{n_asked} of {spec}, seed {settings.seed if settings else 0}" if ask else "",
                divergence=_divergence() if heal else None,
            ),
            metadata=metadata_of(settings),
            report=progress,
        )
        report = made.report
        if proofs:
            report = report.proved(questions, report=progress)
    print(f"{report.path}: {report.n_bytes / 1e6:.1f} MB, {report.bits_per_weight:.2f} bits a weight")
    print(*report.summary(), *made.summary(), sep="\n")
    print(f"next: deepdistill chat {report.path}")
    if json_output:
        measured = {key: value for key, value in dataclasses.asdict(made).items() if key != "report"}
        print(json.dumps(dataclasses.asdict(report) | measured, default=str))
    if report.proofs and report.proofs.failed:
        raise GateError(f"{report.path} does not do what its checkpoint does", "the proofs above say where they differ")


def _verify(
    path: Path, student: Path | None, imatrix: str | None, base: Path | None, json_output: bool, quiet: bool
) -> None:
    """Make a file again from its sources and compare."""
    from ..quantize.verify import verify as run_verify

    folder, _ = run_of(student) if student else (None, None)
    with bars(quiet) as progress:
        found = run_verify(
            path,
            folder / "student" if folder else student,
            imatrix_path=Path(imatrix) if imatrix else None,
            base=base,
            report=progress,
        )
    print(*found.summary(), sep="\n")
    if json_output:
        print(json.dumps(dataclasses.asdict(found) | {"holds": found.holds}))
    if not found.holds:
        raise GateError(f"{path} is not what its sources make", "the lines above say what differs")


def _asking(spec: str, settings: TeachRecipe | None, n: int, progress: Bars) -> Callable[[Path], Answers]:
    """Return what asks a GGUF the same n test problems each time, and says which it got right."""
    from ..distill.evaluation.evaluate import score_file
    from ..distill.problems.load import load_problems
    from ..distill.recipe import ScoresRecipe
    from ..quantize.measure.paired import Answers

    held_out = load_problems(spec, "test", n=n, seed=settings.seed if settings else 0)
    max_tokens = (settings.scores if settings else ScoresRecipe()).max_tokens

    def ask(path: Path) -> Answers:
        with tempfile.TemporaryDirectory() as folder:
            answers = Path(folder) / "answers.jsonl"
            score = score_file(path, held_out, max_tokens=max_tokens, answers_path=answers, report=progress)
            lines = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
        return Answers(tuple(line["verdict"] == "right" for line in lines), score.closed, score.looped)

    return ask


def _traces_of(folder: Path | None, settings: TeachRecipe | None) -> Path | None:
    """Return a run's traces, where it keeps them or where it was given them."""
    found = [
        folder / "traces.jsonl" if folder else None,
        settings.traces.file if settings else None,
    ]
    return next((path for path in found if path and path.is_file()), None)


def _divergence() -> Callable[..., Any]:
    """Return the loss of healing."""
    try:
        from ..distill.training.losses import projected_kl
    except ImportError as error:
        raise UsageError("--heal needs torch", "pip install 'deepdistill[teach]'") from error
    return projected_kl
