"""Score models on held-out problems: each hop of a run once, or any model alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...localrun.core.generation import Sampling
from ...localrun.core.reporter import SILENT, Reporter
from ..context import Context
from ..problems.load import load_problems
from ..recipe.teach import EvalRecipe
from ..records import NONE, Problem
from ..teachers import open_teacher
from ..training.student import student_dir
from .evaluate import Score, evaluate


def score_hops(context: Context, base: Path, held_out: Sequence[Problem]) -> None:
    """Score every hop that is not in scores.json yet."""
    graded = [problem for problem in held_out if problem.grader != NONE]
    if not graded:
        context.report.say("nothing is scored: no held-out problem has an answer")
        return
    run, recipe, rounds = context.run, context.recipe, context.recipe.on_policy.rounds
    imitated = {"imitation": run.first_student_dir(rounds)} if rounds else {}  # the student that only imitated
    for hop, model in {"base": base, **imitated, "student": run.student_dir}.items():
        scores = run.load("scores.json") or {}
        if hop in scores:
            continue
        with context.open_student(model) as student:
            score = evaluate(
                student,
                graded,
                sampling=Sampling(max_tokens=recipe.scores.max_tokens),
                answers_path=run.folder / "answers" / f"{hop}.jsonl",
                report=context.report,
                stage=f"scoring the {hop}",
            )
        scores[hop] = vars(score) | {"problems": recipe.problems, "seed": recipe.seed}
        run.save("scores.json", scores)


def score_model(model: str, recipe: EvalRecipe, *, report: Reporter = SILENT) -> Score:
    """Score any model that can be opened as a teacher, on problems of the test bucket.

    Raises:
        UsageError, ArtifactError: the problems cannot be loaded.
        TeacherError, ModelError: the model cannot be opened, or does not answer.
    """
    resources = recipe.resources
    held_out = load_problems(
        recipe.problems,
        "test",
        n=recipe.n,
        seed=recipe.seed,
        offline=resources.offline,
        asking=recipe.asking,
        report=report,
    )
    name = str(student_dir(model)) if model == "smollm2" else model
    with open_teacher(name, model=recipe.server_model, request=recipe.request, **vars(resources)) as teacher:
        for source in {problem.source for problem in held_out}:
            teacher.accepts(source)
        return evaluate(
            teacher,
            held_out,
            sampling=Sampling(temperature=recipe.temperature, seed=recipe.seed, max_tokens=recipe.max_tokens),
            answers_path=recipe.answers,
            report=report,
        )
