"""The first stage of `teach`: judged traces in the run's store, asked of a teacher or imported from other files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..errors import ArtifactError
from ..localrun.core.record_log import read_records
from ..localrun.core.reporter import SILENT
from .context import Context
from .graders.pool import Grader, grade_answer
from .judging.judge_traces import REPLIES_FILE, judge_ungraded
from .problems.instruction import instructed
from .recipe.teach import TeachRecipe
from .records import Problem, Trace
from .run import Run
from .teachers import Teacher
from .teachers.ask_once import ask_once, stored_replies
from .teachers.budget import Budget
from .teachers.capabilities import USUAL_LOGPROBS, describe, probe
from .teachers.expand import expand
from .teachers.worked import WORKED, WorkedTeacher
from .traces.collect import CollectSettings, collect, failures_usd
from .traces.importing import import_traces
from .traces.store import TraceStore

_EXPANDED = "expand.jsonl"


def gather(context: Context, problems: Sequence[Problem], evaluation: Sequence[str]) -> None:
    """Ask for every trace that is still wanted, and judge what no grader could. No trace is asked for twice.

    `evaluation` holds the questions that the student will be scored on: no new problem may touch them.

    Raises:
        DeepDistillError: see each part; what was paid for is kept.
    """
    run, recipe, report = context.run, context.recipe, context.report
    with TraceStore(run.traces_path) as store, Grader() as grader:
        for repair in store.repairs:
            report.say(repair)
        budget = Budget(recipe.cost, spent_before(run) if recipe.cost.price else 0.0)
        if recipe.traces.expand.n:
            problems = [*problems, *_expanded(context, problems, evaluation=evaluation, budget=budget)]
        collected = collect(
            problems,
            store,
            settings=CollectSettings(
                recipe.teacher.model, recipe.sampling, recipe.traces.samples, recipe.keep, recipe.teacher.logprobs
            ),
            open_teacher=lambda: _probed_teacher(context, problems),
            grader=grader,
            budget=budget,
            report=report,
        )
        if collected.n_failed:
            report.say(f"{collected.n_failed} requests failed for good: see {run.folder}/failures.jsonl")
        if collected.stopped:
            report.say(f"no more traces: {collected.stopped}")
        _judge(context, store, grader=grader, budget=budget)
        if recipe.cost.price:
            report.say(f"${budget.usd:.2f} spent on this run so far")


def spent_before(run: Run) -> float:
    """Return the dollars that a run has cost so far: traces, failures, corrections, new problems, a judge's replies."""
    spent = failures_usd(run.traces_path)
    for path in (run.traces_path, *run.folder.glob("rounds/*/corrections.jsonl")):
        if path.exists():
            spent += sum(trace.cost_usd or 0.0 for trace in TraceStore.read(path))
    for name in (_EXPANDED, REPLIES_FILE):
        spent += sum(reply.cost_usd or 0.0 for reply in stored_replies(run.folder / name).values())
    return spent


def take_in(context: Context, path: Path) -> None:
    """Import the traces of another tool's file, each once, and grade those whose rows hold an answer.

    Raises:
        ArtifactError: the file is missing or broken, or nothing in it is recognised.
    """
    report, skipped = context.report, list[tuple[str, str]]()
    with TraceStore(context.run.traces_path) as store, Grader() as grader:
        for n, (problem, trace) in enumerate(import_traces(path, on_skip=lambda *fault: skipped.append(fault)), 1):
            if not store.has(trace.id):
                grade = grade_answer(grader, problem, trace)
                verdict, by = grade.verdict, grade.verdict_by
                graded = replace(trace, answer=grade.answer, verdict=verdict, verdict_by=by, reason=grade.reason)
                asked = instructed(trace.messages, context.recipe.asking.instruction or "")
                store.append(replace(graded, messages=asked, grader=problem.grader, score=grade.score))
            report.progress("import", n, total=n + 1, note=f"{len(store)} traces")
        report.progress("import", 1, total=1, note=f"{len(store)} traces")
        _judge(context, store, grader=grader, budget=Budget(context.recipe.cost))
    if skipped:
        (where, why), more = skipped[0], f", and {len(skipped) - 1:,} more" if len(skipped) > 1 else ""
        report.say(f"{len(skipped):,} rows of {path} are left out: {where}: {why}{more}")


def is_traces_file(path: Path) -> bool:
    """Say whether a file holds our own traces."""
    try:
        return path.suffix == ".jsonl" and next(read_records(path, Trace), None) is not None
    except ArtifactError:
        return False


def as_told(recipe: TeachRecipe) -> TeachRecipe:
    """Return the recipe without the usual instructions if the traces that it was given were made without them."""
    file, asking = recipe.traces.file, recipe.asking
    if file is None or asking.instruction is not None or asking.graders == "columns":
        return recipe
    if is_traces_file(file) and next(read_records(file, Trace)).grader:
        return recipe
    return replace(recipe, asking=replace(asking, instruction=""))


def _expanded(
    context: Context, problems: Sequence[Problem], *, evaluation: Sequence[str], budget: Budget
) -> list[Problem]:
    """Return the new problems that the teacher writes."""
    recipe = context.recipe
    new = expand(
        problems,
        recipe.traces.expand,
        teacher=recipe.teacher.model,
        ask=lambda asks: ask_once(
            asks,
            context.run.folder / _EXPANDED,
            sampling=recipe.traces.expand.sampling,
            open_teacher=context.open_teacher,
            budget=budget,
            report=context.report,
            stage="new problems",
        ),
        evaluation=evaluation,
    )
    dropped = ", ".join(f"{n} {reason.replace('_', ' ')}" for reason, n in new.dropped.items() if n)
    context.report.say(
        f"{len(new.problems)} new problems of {new.n_written} written" + (f"; {dropped}" if dropped else "")
    )
    return new.problems


def _probed_teacher(context: Context, problems: Sequence[Problem]) -> Teacher:
    """Open the teacher, and say what it gives beside text."""
    if context.recipe.teacher.model == WORKED:
        return WorkedTeacher(problems)
    teacher, n_logprobs = context.open_teacher(), context.recipe.teacher.logprobs
    try:
        for source in sorted({problem.source for problem in problems}):
            teacher.accepts(source)
        if not n_logprobs:
            teacher.on_note = SILENT.say  # what is not asked for later need not be said
        context.report.say(describe(probe(teacher, n_logprobs or USUAL_LOGPROBS)))
        teacher.on_note = context.report.say
    except BaseException:
        teacher.close()
        raise
    return teacher


def _judge(context: Context, store: TraceStore, *, grader: Grader, budget: Budget) -> None:
    recipe = context.recipe
    budget.price = recipe.cost.price_of_judge(recipe.judge.model, recipe.teacher.model)
    judge_ungraded(store, grader, context=context, budget=budget)
