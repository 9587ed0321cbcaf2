"""The teacher's part of a round: it scores the student's answers, and answers what the student could not solve.

It is opened once, only if there is work for it, and has to be the teacher that the run had before.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from ....errors import TeacherError
from ....localrun.core.reporter import SILENT, Reporter
from ...context import Context
from ...gather import spent_before
from ...graders.pool import Grader
from ...recipe.teach import TeachRecipe
from ...records import Problem, Trace, id_key
from ...run import Run
from ...teachers import Teacher, TeacherInfo
from ...teachers.budget import Budget
from ...teachers.vocabulary import STRESS_TEXT, is_same, tokenizes_alike
from ...teachers.worked import WORKED, WorkedTeacher
from ...tokenizer import Tokenizer, ids_of
from ...traces.collect import CollectSettings, collect
from ...traces.logprobs import Logprobs, LogprobsWriter, encode, logprobs_path
from ...traces.store import TraceStore
from .dataset import pass_rates
from .round import Round


def ask_teacher(
    context: Context,
    round_: Round,
    *,
    problems: Sequence[Problem],
    samples: Sequence[Trace],
    tokenizer: Tokenizer,
) -> dict[str, Any]:
    """Have the teacher score the samples and answer what the student could not solve; return round.json's record.

    Raises:
        TeacherError: `code` "teacher-differs": it is not the teacher of the run; "cannot-score": it lacks what
            `on_policy.loss` needs.
    """
    run, options = context.run, context.recipe.on_policy
    name = f"rounds/{round_.number}/round.json"
    record: dict[str, Any] = run.load(name) or {}
    record["settings"] = dataclasses.asdict(options)
    with _teacher_when_needed(context, problems) as teacher:
        if options.loss == "off":
            record |= {"scored": False, "why_not": "on_policy.loss is off"}
        elif "scored" not in record:
            why = _reason_unscored(context, teacher(), tokenizer)
            record |= {"scored": not why, "why_not": why}
        record["teacher"] = run.load("teacher.json")
        run.save(name, record)
        if record["scored"]:
            score_samples(
                samples,
                logprobs_path(round_.samples_path),
                teacher=teacher,
                out=round_.scores_path,
                top_logprobs=options.top_logprobs,
                report=context.report,
            )
        _correct(context, round_, problems=problems, samples=samples, teacher=teacher)
    record["teacher_done"] = True
    run.save(name, record)
    return record


@contextmanager
def _teacher_when_needed(context: Context, problems: Sequence[Problem]) -> Iterator[Callable[[], Teacher]]:
    """Yield a function that opens the run's teacher at its first call, and close what it opened."""
    with ExitStack() as opened:

        @cache
        def teacher() -> Teacher:
            is_worked = context.recipe.teacher.model == WORKED
            model = WorkedTeacher(problems) if is_worked else context.open_teacher()
            opened.callback(model.close)
            _must_be_the_same(context.run, model.info, context.recipe)
            return model

        yield teacher


def _reason_unscored(context: Context, teacher: Teacher, tokenizer: Tokenizer) -> str | None:
    """Return why the samples go unscored, which the user is told; None if they will be scored.

    Raises:
        TeacherError: `code` "cannot-score": the recipe names a loss that needs the scores.
    """
    loss = context.recipe.on_policy.loss
    why = why_not_scored(teacher, tokenizer)
    if why and loss != "auto":
        hint = "set on_policy.loss to auto, or choose another teacher"
        raise TeacherError(f"on_policy.loss={loss}: {why}", hint, code="cannot-score")
    if why:
        context.report.say(
            f"{why}: the round trains on the student's own correct answers and the teacher's corrections"
        )
    return why


def _correct(
    context: Context,
    round_: Round,
    *,
    problems: Sequence[Problem],
    samples: Sequence[Trace],
    teacher: Callable[[], Teacher],
) -> None:
    """Ask for answers to the problems that the student solves too rarely, except those that the run has solved."""
    recipe = context.recipe
    rates = pass_rates(samples)
    failed = [problem for problem in problems if rates.get(problem.id, 1.0) < recipe.on_policy.correct_below]
    with TraceStore(round_.corrections_path) as store, Grader() as grader:
        known = {trace.problem_id for trace in store}
        solved = _reuse_traces(context.run, store, {problem.id for problem in failed} - known)
        collect(
            [problem for problem in failed if problem.id not in solved],
            store,
            settings=CollectSettings(
                recipe.teacher.model,
                recipe.sampling,
                recipe.traces.samples,
                recipe.keep,
                stage=f"round {round_.number}, teacher",
            ),
            open_teacher=teacher,
            grader=grader,
            budget=Budget(recipe.cost, spent_before(context.run) if recipe.cost.price else 0.0),
            report=context.report,
        )


def _reuse_traces(run: Run, store: TraceStore, wanted: set[str]) -> set[str]:
    """Copy the run's first right trace of each wanted problem into the store; return which problems have one."""
    found: set[str] = set()
    if wanted and run.traces_path.exists():
        for trace in TraceStore.read(run.traces_path):
            if trace.problem_id in wanted - found and trace.verdict == "right":
                store.append(dataclasses.replace(trace, cost_usd=None))  # paid for already
                found.add(trace.problem_id)
    return found


def _must_be_the_same(run: Run, info: TeacherInfo, recipe: TeachRecipe) -> None:
    """Remember who teaches this run, and refuse another.

    Raises:
        TeacherError: `code` "teacher-differs": another model answered or scored before.
    """
    now = dataclasses.asdict(info)
    before = run.load("teacher.json")
    if before is None and recipe.traces.file is None and run.traces_path.exists():
        with suppress(StopIteration):
            before = dataclasses.asdict(next(TraceStore.read(run.traces_path)).teacher)
    # A field that a teacher does not report, or that an older run did not keep, cannot differ.
    differing = [key for key, value in (before or {}).items() if value is not None and now[key] not in (value, None)]
    if before and differing:
        field = differing[0]
        raise TeacherError(
            f"{info.name} is not the teacher of this run: its {field} is {now[field]}, and was {before[field]}",
            "give the same teacher, or another folder with --out",
            code="teacher-differs",
        )
    if run.load("teacher.json") is None:
        run.save("teacher.json", now)


def why_not_scored(teacher: Teacher, tokenizer: Tokenizer) -> str | None:
    """Return why a teacher cannot score the student's tokens; None if it can.

    A teacher that can has the student's vocabulary, and gives log-probabilities of a text that it did not write.
    """
    same = is_same(teacher.vocabulary, tokenizer)
    if same is None:
        same = tokenizes_alike(teacher.tokenize(STRESS_TEXT), tokenizer)
    if same is None:
        return "the teacher does not report its tokens"
    if not same:
        return "the teacher has another tokenizer"
    messages = [{"role": "user", "content": "2 + 3 ="}]
    try:
        teacher.score(messages, ids_of(tokenizer, "5"), top_logprobs=1)
    except TeacherError as error:
        return error.message
    return None


def score_samples(
    samples: Sequence[Trace],
    samples_logprobs: Path,
    *,
    teacher: Callable[[], Teacher],
    out: Path,
    top_logprobs: int,
    report: Reporter = SILENT,
) -> int:
    """Score the samples that `out` lacks, and return how many; the teacher is opened only if there are any.

    `samples_logprobs` is the samples' sidecar, which has the student's tokens. Once `out` is complete, training needs
    no teacher.

    Raises:
        TeacherError: the teacher cannot score.
        ArtifactError: a file is broken, or cannot be written.
    """
    keys = {id_key(trace.id) for trace in samples}
    with Logprobs(samples_logprobs) as sampled, LogprobsWriter(out, keys) as writer:
        with Logprobs(out) as scored:
            found = [(trace, sampled.get(trace.id)) for trace in samples if trace.id not in scored]
        wanted = [(trace, stored[0].tolist()) for trace, stored in found if stored is not None]
        asked = [(trace.messages, ids) for trace, ids in wanted]
        scores = teacher().score_many(asked, top_logprobs=top_logprobs) if wanted else iter(())
        for done, (index, top) in enumerate(scores, 1):
            trace, ids = wanted[index]
            writer.write(encode(trace.id, ids, top))
            report.progress("the teacher scores", done, total=len(wanted))
    return len(wanted)
