"""The whole of `teach`: problems -> traces -> a trained student -> scores, each stage from the artifact before it.

A stage that finds its artifact in the run folder is done, so the same command resumes where the last one stopped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ArtifactError, UsageError
from ..localrun.core.reporter import SILENT, Reporter
from ..localrun.core.settings import check
from .context import Context
from .curation.curate import apart_from, select
from .curation.filters import LONG_SHARE_SMALL
from .evaluation.hops import score_hops
from .evaluation.live import LiveReport
from .evaluation.report import write_report
from .gather import as_told, gather, is_traces_file, take_in
from .judging.judge_traces import check_judged
from .preview import describe_problem
from .problems.load import load_problems
from .recipe.gathering import CurationRecipe
from .recipe.teach import Stage, TeachRecipe
from .records import NONE, Problem, Trace
from .run import Run, settled
from .teachers import Teacher, open_teacher
from .traces.store import TraceStore
from .training.pass_rate import own_pass_rates
from .training.stage import check_training, train_first
from .training.student import student_dir


@dataclass(frozen=True)
class TeachResult:
    """The results of a run so far: the student's folder and the score of each hop, if there are any."""

    folder: Path
    student_dir: Path | None
    curation: dict[str, Any]
    scores: dict[str, dict[str, Any]]
    training: dict[str, Any] | None


def teach(
    recipe: TeachRecipe,
    folder: Path,
    *,
    report: Reporter = SILENT,
    stop_after: Stage | None = None,
    opener: Callable[..., Teacher] = open_teacher,
) -> TeachResult:
    """Run every stage that the folder does not hold yet and return what it holds then.

    `stop_after` "samples" and "teacher" end before and after what a round wants of the teacher (see on_policy/rounds).
    `opener` opens teacher and judge; with one of your own they can be any `Teacher` objects.

    >>> from pathlib import Path
    >>> from deepdistill import TeachRecipe, teach
    >>> settings = {"problems": "gym:chain_sum?max_terms=2&max_digits=1", "student": "pocket", "traces": {"n": 8}}
    >>> recipe = TeachRecipe.from_json({"version": 1, "scores": {"n": 4, "max_tokens": 16}, **settings})
    >>> result = teach(recipe, Path("runs/first"))
    >>> result.curation["kept"], result.scores["student"]["n"]
    (8, 4)

    Raises:
        DeepDistillError: see each stage; what was done so far stays in the folder.
    """
    recipe = as_told(settled(check(recipe), folder))
    with Run(folder, recipe) as run, LiveReport(run, report) as live:
        context = Context(run, recipe, live, stop_after, opener)
        # Faults of the student, the held-out problems or the filters end the run here, before anything is paid for.
        offline = recipe.resources.offline
        base = student_dir(recipe.student, offline) if stop_after != "traces" else None
        problems, held_out = draw_problems(recipe, report=report)
        report.say("\n".join(("the first problem, as it is asked:", *describe_problem(problems[0]))))
        _check(context, problems, base)
        kept, done = _learned(context, base, problems=problems, held_out=held_out)
        if base is not None and done and stop_after != "training":
            score_hops(context, base, held_out)
        if run.student_dir.exists() and not recipe.training.keep_checkpoints:
            run.drop_checkpoints()
        result = TeachResult(
            folder=folder,
            student_dir=run.student_dir if run.student_dir.exists() else None,
            curation=run.load("curation.json") or {},
            scores=run.load("scores.json") or {},
            training=run.load("training.json"),
        )
        write_report(run, kept)
        return result


def draw_problems(recipe: TeachRecipe, *, report: Reporter = SILENT) -> tuple[list[Problem], list[Problem]]:
    """Return the problems to ask and the held-out ones; without any answers there may be no held-out ones."""
    spec, seed, offline = recipe.problems, recipe.seed, recipe.resources.offline
    asking = recipe.asking
    asked = load_problems(spec, "train", n=recipe.traces.n, seed=seed, offline=offline, asking=asking, report=report)
    try:
        return asked, load_problems(spec, "test", n=recipe.scores.n, seed=seed, offline=offline, asking=asking)
    except ArtifactError:
        if all(problem.grader == NONE for problem in asked):
            return asked, []
        raise


def _check(context: Context, problems: list[Problem], base: Path | None) -> None:
    """Check the settings as far as that is possible before a teacher is asked.

    Raises:
        UsageError: they do not go together, or the problems do not allow them.
        ModelError: the student cannot be taught.
    """
    recipe, rounds = context.recipe, context.recipe.on_policy.rounds
    if recipe.training.method == "grpo" and (base is None or rounds):
        hint = "leave --stop-after traces and --rounds out"
        raise UsageError("--method grpo has no teacher, so no traces and no rounds", hint, code="settings-conflict")
    if context.stop_after in ("samples", "teacher") and not rounds:
        message = f"--stop-after {context.stop_after} ends a round, and there are none"
        raise UsageError(message, "give --rounds", code="no-rounds")
    if base is not None and recipe.training.method == "distill":
        check_training(context, base)
    if rounds and all(problem.grader == NONE for problem in problems):
        message = "--rounds needs problems with an answer to grade by"
        raise UsageError(message, "leave --rounds out", code="no-answers")
    if recipe.training.loss == "logits" and recipe.traces.file is None and not recipe.teacher.logprobs:
        message = "training.loss=logits needs the teacher's log-probabilities"
        raise UsageError(message, "give --logprobs 64", code="logprobs-missing")


def _learned(
    context: Context, base: Path | None, *, problems: list[Problem], held_out: list[Problem]
) -> tuple[Iterable[Trace], bool]:
    """Have the student learn; return the traces that train, and whether all trainings are done."""
    if context.recipe.training.method == "distill":
        return _distill(context, base, problems=problems, held_out=held_out)
    from .training.rl.stage import reinforce

    assert base is not None, "checked before"
    reinforce(context, base, apart_from(problems, held_out, filters=context.recipe.curation, report=context.report))
    return (), True


def _distill(
    context: Context, base: Path | None, *, problems: list[Problem], held_out: list[Problem]
) -> tuple[Iterable[Trace], bool]:
    """Gather traces, curate them and train on them; return those that train, and whether all trainings are done."""
    run, recipe = context.run, context.recipe
    traces_path = _traces(context, problems, held_out)
    rates = own_pass_rates(context, base, problems) if base else None
    selected = select(
        lambda: TraceStore.read(traces_path),
        _filters(recipe, base),
        evaluation=[problem.question for problem in held_out],
        pass_rate=rates,
        seed=recipe.seed,
    )
    if not run.is_trained:
        run.save("curation.json", selected.record)
    if not selected and context.stop_after != "traces":
        write_report(run, selected)
        why = _why_none(selected.record)
        raise ArtifactError(f"no trace to train on in {traces_path}", why, code="nothing-to-train")
    if base is None:
        return selected, False  # read again where they are wanted: there may be a million
    kept = list(selected)
    rows = train_first(context, base, traces=kept, traces_path=traces_path, rates=rates or {})
    if not recipe.on_policy.rounds:
        return kept, True
    from .training.on_policy.rounds import go_rounds  # loads torch

    return kept, go_rounds(context, earlier=rows, held_out=held_out, base=base)


def _filters(recipe: TeachRecipe, base: Path | None) -> CurationRecipe:
    """Return the filters with what the student's size decides: small students learn most from a mix of lengths."""
    share = recipe.curation.long_share
    if share is None:
        share = LONG_SHARE_SMALL if base and _is_small(base) else 0.0
    keep = recipe.curation.keep if recipe.traces.file else recipe.keep
    return dataclasses.replace(recipe.curation, keep=keep, long_share=share)


def _traces(context: Context, problems: list[Problem], held_out: list[Problem]) -> Path:
    """Return the file of the run's traces: asked for, imported from another tool's file, or read where they are."""
    run, file = context.run, context.recipe.traces.file
    if run.is_trained and run.traces_path.exists():
        return run.traces_path  # with more of them the training would resume with other rows
    if file is None:
        if context.stop_after != "traces":
            check_judged(problems, context.recipe)
        gather(context, problems, [problem.question for problem in held_out])
    elif is_traces_file(file):
        return file
    else:
        take_in(context, file)
    return run.traces_path


def _is_small(base: Path) -> bool:
    """Say whether a checkpoint has less than 3 B parameters, taking two bytes for each."""
    return sum(path.stat().st_size for path in base.glob("*.safetensors")) < 6e9


def _why_none(record: dict[str, Any]) -> str:
    reasons = [f"{count} {name.replace('_', ' ')}" for name, count in record["dropped"].items() if count]
    return f"of {record['traces']} traces: {', '.join(reasons) or 'none at all'}"
