"""The first stage of `teach`: judged traces in the run's store, asked of a teacher or taken in from others' files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..localrun.core.record_log import from_json
from ..localrun.core.reporter import Progress, Relay
from .graders.pool import Grader
from .judging.judge_traces import settle
from .recipe import TeachSettings, Work
from .records import Problem, Trace
from .run import Run
from .teachers import Teacher
from .teachers.ask_once import stored_replies
from .teachers.budget import Budget
from .teachers.capabilities import USUAL_LOGPROBS, describe, probe
from .teachers.expand import ExpandSettings, expand
from .teachers.worked import WORKED, WorkedTeacher
from .traces.collect import CollectSettings, collect, failures_usd
from .traces.importing import import_traces
from .traces.store import TraceStore

_EXPANDED, _JUDGED = "expand.jsonl", "judge.jsonl"


def gather(
    run: Run,
    problems: Sequence[Problem],
    evaluation: Sequence[str],
    settings: TeachSettings,
    work: Work,
    on_progress: Progress,
) -> None:
    """Ask for every trace that is still wanted, and judge what no grader could. What is there is not asked again.

    `evaluation` holds the questions that the student will be scored on: no new problem may touch them.

    Raises:
        DeepDistillError: see each part; what was paid for is kept.
    """
    expanded_path = run.folder / _EXPANDED
    with TraceStore(run.traces_path) as store, Grader() as grader:
        for repair in store.repairs:
            work.say(repair)
        budget = Budget(work.limits, spent_before(run) if work.limits.price else 0.0)

        def open_teacher() -> Teacher:
            return work.open_teacher(settings.teacher, settings.teacher_model)

        def open_and_probe() -> Teacher:
            if settings.teacher == WORKED:
                return WorkedTeacher(problems)
            teacher = open_teacher()
            try:
                for source in sorted({problem.source for problem in problems}):
                    teacher.accepts(source)
                if not settings.logprobs:
                    teacher.on_note = lambda _: None  # what is not asked for later need not be said
                work.say(describe(probe(teacher, settings.logprobs or USUAL_LOGPROBS)))
                teacher.on_note = work.say
            except BaseException:
                teacher.close()
                raise
            return teacher

        if settings.expand:
            new = expand(
                problems,
                ExpandSettings(settings.teacher, settings.expand),
                path=expanded_path,
                open_teacher=open_teacher,
                evaluation=evaluation,
                budget=budget,
                report=Relay(on_progress),
            )
            dropped = ", ".join(f"{n} {reason.replace('_', ' ')}" for reason, n in new.dropped.items() if n)
            work.say(
                f"{len(new.problems)} new problems of {new.n_written} written" + (f"; {dropped}" if dropped else "")
            )
            problems = [*problems, *new.problems]
        collected = collect(
            problems,
            store,
            settings=CollectSettings(
                settings.teacher, settings.teacher_sampling(), settings.samples, settings.keep, settings.logprobs
            ),
            open_teacher=open_and_probe,
            grader=grader,
            budget=budget,
            report=Relay(on_progress),
        )
        if collected.n_failed:
            work.say(f"{collected.n_failed} requests failed for good: see {run.folder}/failures.jsonl")
        if collected.stopped:
            work.say(f"no more traces: {collected.stopped}")
        _settle(run, store, grader, settings, work, budget, on_progress)
        if work.limits.price:
            work.say(f"${budget.usd:.2f} spent on this run so far")


def spent_before(run: Run) -> float:
    """Return the dollars that a run has cost so far: traces, failures, corrections, new problems, a judge's replies."""
    spent = failures_usd(run.traces_path)
    for path in (run.traces_path, *run.folder.glob("rounds/*/corrections.jsonl")):
        if path.exists():
            spent += sum(trace.cost_usd or 0.0 for trace in TraceStore.read(path))
    for name in (_EXPANDED, _JUDGED):
        spent += sum(reply.cost_usd or 0.0 for reply in stored_replies(run.folder / name).values())
    return spent


def take_in(run: Run, path: Path, settings: TeachSettings, work: Work, on_progress: Progress) -> None:
    """Import the traces of another tool's file, each graded here if its row holds an answer; once for each trace.

    Raises:
        ArtifactError: the file is missing or broken, or nothing in it is recognised.
    """
    n_skipped = 0

    def skip(where: str, why: str) -> None:
        nonlocal n_skipped
        n_skipped += 1

    with TraceStore(run.traces_path) as store, Grader() as grader:
        for n, (problem, trace) in enumerate(import_traces(path, on_skip=skip), 1):
            if not store.has(trace.id):
                grade = grader.grade(problem, trace.content)
                store.append(replace(trace, answer=grade.answer, verdict=grade.verdict, verdict_by=grade.verdict_by))
            on_progress("import", n, n + 1, f"{len(store)} traces")
        on_progress("import", 1, 1, f"{len(store)} traces")
        _settle(run, store, grader, settings, work, Budget(work.limits), on_progress)
    if n_skipped:
        work.say(f"{n_skipped} rows of {path} hold no answer and were left out")


def is_traces_file(path: Path) -> bool:
    """Say whether a file holds our own traces."""
    if not path.is_file() or path.suffix != ".jsonl":
        return False
    with path.open("rb") as lines:
        try:
            from_json(Trace, lines.readline())
        except ValueError:
            return False
    return True


def _settle(
    run: Run,
    store: TraceStore,
    grader: Grader,
    settings: TeachSettings,
    work: Work,
    budget: Budget,
    on_progress: Progress,
) -> None:
    budget.price = work.limits.price_of_judge(settings.judge, settings.teacher)
    judged = settle(
        store,
        grader,
        voting=settings.vote_settings(),
        judging=settings.judge_settings(),
        replies_path=run.folder / _JUDGED,
        open_judge=lambda: work.open_teacher(settings.judge or settings.teacher, settings.model_of_judge),
        budget=budget,
        say=work.say,
        on_progress=on_progress,
    )
    if judged and judged.n_unreadable:
        work.say(f"{judged.n_unreadable} verdicts of the judge could not be read: those traces stay unjudged")
