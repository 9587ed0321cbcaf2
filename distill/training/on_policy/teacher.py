"""The teacher's part of a round: it scores what the student said, and answers what the student could not solve.

It is opened once, only if something is wanted of it, and has to be the teacher that the run had before.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from functools import cache
from pathlib import Path
from typing import Any

from ....errors import TeacherError
from ....localrun.core.reporter import SILENT, Progress, Relay, Reporter
from ...gather import spent_before
from ...graders.pool import Grader
from ...recipe import TeachSettings, Work
from ...records import Problem, Trace, id_key
from ...run import Run
from ...teachers import Teacher, TeacherInfo
from ...teachers.budget import Budget
from ...teachers.vocabulary import STRESS_TEXT, is_same, tokenizes_alike
from ...teachers.worked import WORKED, WorkedTeacher
from ...tokenizer import Tokenizer
from ...traces.collect import CollectSettings, collect
from ...traces.logprobs import Logprobs, LogprobsWriter, encode, logprobs_path
from ...traces.store import TraceStore
from .dataset import MixtureSettings, pass_rates
from .round import Round, RoundSettings


def ask_teacher(
    run: Run,
    round_: Round,
    problems: Sequence[Problem],
    samples: Sequence[Trace],
    tokenizer: Tokenizer,
    settings: TeachSettings,
    options: RoundSettings,
    work: Work,
    on_progress: Progress,
) -> dict[str, Any]:
    """Have the teacher score the samples and answer what the student could not solve; return round.json's record.

    Raises:
        TeacherError: the teacher is not the one of the run, or cannot do what was asked for.
    """
    record: dict[str, Any] = run.load(f"rounds/{round_.number}/round.json") or {}
    record["settings"] = dataclasses.asdict(options)
    with ExitStack() as opened:

        @cache
        def teacher() -> Teacher:
            one = WorkedTeacher(problems) if settings.teacher == WORKED else _open(work, settings)
            opened.callback(one.close)
            _must_be_the_same(run, one.info, settings)
            return one

        if options.on_policy == "off":
            record |= {"scored": False, "why_not": "--on-policy-loss off"}
        elif "scored" not in record:
            why = why_not_scored(teacher(), tokenizer)
            if why and options.on_policy != "auto":
                raise TeacherError(
                    f"--on-policy-loss {options.on_policy}: {why}", "leave it out, or take another teacher"
                )
            if why:
                work.say(f"{why}: a round is the student's own right answers and the teacher's corrections")
            record |= {"scored": not why, "why_not": why}
        record["teacher"] = run.load("teacher.json")
        run.save(f"rounds/{round_.number}/round.json", record)
        if record["scored"]:
            score_samples(
                samples,
                logprobs_path(round_.samples_path),
                teacher=teacher,
                out=round_.scores_path,
                top_logprobs=options.top_logprobs,
                report=Relay(on_progress),
            )
        _correct(run, round_, problems, samples, teacher, settings, work, on_progress)
    record["teacher_done"] = True
    run.save(f"rounds/{round_.number}/round.json", record)
    return record


def _open(work: Work, settings: TeachSettings) -> Teacher:
    return work.open_teacher(settings.teacher, settings.teacher_model)


def _correct(
    run: Run,
    round_: Round,
    problems: Sequence[Problem],
    samples: Sequence[Trace],
    teacher: Callable[[], Teacher],
    settings: TeachSettings,
    work: Work,
    on_progress: Progress,
) -> None:
    """Ask for answers to the problems that the student solves too rarely, but for those that have one in the run."""
    rates = pass_rates(samples)
    failed = [problem for problem in problems if rates.get(problem.id, 1.0) < MixtureSettings.correct_below]
    with TraceStore(round_.corrections_path) as store, Grader() as grader:
        known = {trace.problem_id for trace in store}
        wanted = {problem.id for problem in failed} - known
        if wanted and run.traces_path.exists():
            for trace in TraceStore.read(run.traces_path):
                if trace.problem_id in wanted and trace.verdict == "right":
                    store.append(dataclasses.replace(trace, cost_usd=None))  # paid for already
                    wanted.discard(trace.problem_id)
        collect(
            [problem for problem in failed if problem.id in wanted or problem.id in known],
            store,
            settings=CollectSettings(settings.teacher, settings.teacher_sampling(), settings.samples, settings.keep),
            open_teacher=teacher,
            grader=grader,
            budget=Budget(work.limits, spent_before(run) if work.limits.price else 0.0),
            report=Relay(
                lambda _, done, total, note: on_progress(f"round {round_.number}, corrected", done, total, note)
            ),
        )


def _must_be_the_same(run: Run, info: TeacherInfo, settings: TeachSettings) -> None:
    """Remember who teaches this run, and refuse another.

    Raises:
        TeacherError: another model answered or scored before.
    """
    now = dataclasses.asdict(info)
    before = run.load("teacher.json")
    if before is None and settings.traces is None and run.traces_path.exists():
        with suppress(StopIteration):
            before = dataclasses.asdict(next(TraceStore.read(run.traces_path)).teacher)
    # What a teacher does not tell about itself, or an older run did not keep, cannot differ.
    odd = [key for key, value in (before or {}).items() if value is not None and now[key] not in (value, None)]
    if before and odd:
        raise TeacherError(
            f"{info.name} is not the teacher of this run: its {odd[0]} was {before[odd[0]]}, is {now[odd[0]]}",
            "give the same teacher, or another folder with --out",
        )
    if run.load("teacher.json") is None:
        run.save("teacher.json", now)


def why_not_scored(teacher: Teacher, tokenizer: Tokenizer) -> str | None:
    """Return why a teacher cannot score the student's tokens; None if it can.

    It has to have the student's vocabulary, and to give log-probabilities of a text that it did not write.
    """
    same = is_same(teacher.vocabulary, tokenizer)
    if same is None:
        same = tokenizes_alike(teacher.tokenize(STRESS_TEXT), tokenizer)
    if same is None:
        return "the teacher does not tell its tokens"
    if not same:
        return "the teacher has another tokenizer"
    messages = [{"role": "user", "content": "2 + 3 ="}]
    try:
        teacher.score(messages, tokenizer("5", add_special_tokens=False).input_ids, top_logprobs=1)
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

    `samples_logprobs` is the samples' sidecar, which has the student's own tokens. Once `out` is complete, training
    needs no teacher.

    Raises:
        TeacherError: the teacher cannot score.
        ArtifactError: a file is broken, or cannot be written.
    """
    with Logprobs.open(samples_logprobs) as own:
        writer = LogprobsWriter(out, {id_key(trace.id) for trace in samples})
        try:
            with Logprobs.open(out) as scored:
                wanted = [trace for trace in samples if trace.id in own and trace.id not in scored]
            scores = _scores(wanted, own, teacher=teacher, top_logprobs=top_logprobs)
            for done, (trace, ids, top) in enumerate(scores, 1):
                writer.append(encode(trace.id, ids, top))
                report.progress("the teacher scores", done, len(wanted))
        finally:
            writer.close()
    return len(wanted)


def _scores(
    wanted: Sequence[Trace], own: Logprobs, *, teacher: Callable[[], Teacher], top_logprobs: int
) -> Iterator[tuple[Trace, list[int], Any]]:
    """Yield (sample, its tokens, the teacher's distribution at each) as the teacher gives them."""
    if not wanted:
        return
    conversations = []
    for trace in wanted:
        stored = own.get(trace.id)
        assert stored is not None
        conversations.append((trace.messages, stored[0].tolist()))
    for index, top in teacher().score_many(conversations, top_logprobs=top_logprobs):
        yield wanted[index], conversations[index][1], top
