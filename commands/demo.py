"""`deepdistill demo`."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..distill.recipe.gathering import TracesRecipe
from ..distill.recipe.teach import DEMO_PROBLEMS, ScoresRecipe, TeachRecipe
from ..distill.recipe.training import TrainingRecipe
from ..localrun.core.settings import changed
from .run_folder import export_gguf
from .shared import AsJson, Offline, Out, Quiet, Seed, bars, console, resumable, tell

if TYPE_CHECKING:
    from ..localrun.core.reporter import Reporter


def demo(
    out: Out = None,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", help="Take a tiny student, in under 90 seconds: it shows the path and learns no skill."
        ),
    ] = False,
    student: Annotated[
        str | None, typer.Option(help="The model to teach: smollm2, pocket, hf:ORG/NAME or a checkpoint folder.")
    ] = None,
    minutes: Annotated[float | None, typer.Option(help="Minutes of training. 8, unless given.", min=0.01)] = None,
    seed: Seed = 0,
    json_output: AsJson = False,
    offline: Offline = False,
    quiet: Quiet = False,
) -> None:
    """Go the whole way once with what is built in, in some minutes.

    Teacher, student and problems come with the package. In the end the finished GGUF answers a question.
    """
    from ..distill.evaluation.report import print_hops, write_report
    from ..distill.run import Run
    from ..distill.teach import teach
    from ..distill.training.student import student_dir

    recipe = _recipe(student or ("pocket" if quick else "smollm2"), quick=quick, minutes=minutes, seed=seed)
    recipe = changed(recipe, {"resources.offline": offline})
    folder = out or Path("runs") / ("demo-quick" if quick else "demo")
    started = time.monotonic()
    with bars(quiet) as progress, resumable(folder):
        result = teach(recipe, folder, report=progress)
        report = export_gguf(
            folder / "student", folder / "student-Q8_0.gguf", type_="Q8_0", recipe=recipe, report=progress
        )
        scores = result.scores | {"gguf": _score_gguf(folder, report.path, recipe=recipe, report=progress)}
        with Run(folder, recipe) as run:
            run.save("scores.json", scores)
            write_report(run)
    question, thinking, answer = _ask(report.path, recipe)
    minutes_taken = (time.monotonic() - started) / 60
    sizes = {
        "base": _weight_bytes(student_dir(recipe.student, offline)),
        "student": _weight_bytes(folder / "student"),
        "gguf": report.path.stat().st_size,
    }
    print_hops(console(), scores, sizes)
    tell(*report.summary())
    tell(f"\nquestion: {question}")
    console().print(thinking.strip(), style="dim", markup=False, highlight=False)
    tell(f"answer:   {answer.strip()}\n\n{minutes_taken:.1f} minutes in all; see {folder}/report.html")
    tell(f"next: deepdistill chat {folder}")
    if json_output:
        print(json.dumps({"run": str(folder), "gguf": str(report.path), "minutes": minutes_taken, "scores": scores}))


def _recipe(student: str, *, quick: bool, minutes: float | None, seed: int) -> TeachRecipe:
    """Return what the demo does: enough traces for its minutes, and what docs/experiments.md found to work."""
    full = student == "pocket"  # a student that knows nothing yet: an adapter on random weights would learn nothing
    boxed = minutes if minutes is not None else (0.4 if quick else 8.0)
    training = TrainingRecipe(minutes=boxed, epochs=100)
    return TeachRecipe(
        DEMO_PROBLEMS,
        student,
        seed=seed,
        traces=TracesRecipe(1000 if quick else 6000),
        scores=ScoresRecipe(50, max_tokens=96) if quick else ScoresRecipe(),
        training=replace(training, weights="full", learning_rate=3e-3)
        if full
        else replace(training, batch_size=4, learning_rate=1.2e-3),
    )


def _weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _ask(gguf: Path, recipe: TeachRecipe) -> tuple[str, str, str]:
    """Ask the finished GGUF the first held-out question; return (question, thinking, answer)."""
    from ..distill.problems.load import load_problems
    from ..localrun.core.generation import Sampling
    from ..localrun.engine.engine import Engine

    question = load_problems(recipe.problems, "test", n=1, seed=recipe.seed)[0].question
    with Engine(gguf, n_ctx=1024) as engine:
        prompt = engine.render([{"role": "user", "content": question}])
        steps = list(engine.stream(prompt, Sampling(max_tokens=recipe.scores.max_tokens)))
    parts = {part: "".join(step.text for step in steps if step.part == part) for part in ("thinking", "answer")}
    return question, parts["thinking"], parts["answer"]


def _score_gguf(folder: Path, path: Path, *, recipe: TeachRecipe, report: Reporter) -> dict[str, Any]:
    """Score a GGUF on the problems that its run was scored on, with the same limits."""
    from ..distill.evaluation.evaluate import score_file
    from ..distill.problems.load import load_problems

    held_out = load_problems(recipe.problems, "test", n=recipe.scores.n, seed=recipe.seed)
    answers_path, max_tokens = folder / "answers" / "gguf.jsonl", recipe.scores.max_tokens
    score = score_file(path, held_out, max_tokens=max_tokens, answers_path=answers_path, report=report)
    return vars(score)
