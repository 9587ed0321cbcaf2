"""On-policy rounds: the student answers, graders judge, the teacher corrects and scores, the student trains on that.

A student that only imitates never sees its own mistakes. A round shows it what the teacher would have said where the
student went its own way. Every part of a round is an artifact in `rounds/N/`: `samples.jsonl` (the student's answers
with their seeds), `scores.bin` (the teacher's log-probabilities of them), `corrections.jsonl`, `round.json`, and the
student that it made. So a round that was killed goes on, and the machine with the teacher is needed for its part alone:
`--stop-after samples`, copy the run there, `--stop-after teacher`, copy it back.

Source: on-policy distillation, GKD arXiv 2306.13649; own right answers, rejection sampling as in R1 (arXiv 2501.12948).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from ..errors import ArtifactError, TeacherError
from ..localrun.generation import Sampling
from ..localrun.progress import Progress
from .budget import Budget
from .collect import CollectSettings, collect
from .curriculum import arrange, counts
from .gather import spent_before
from .grade import Grader
from .graders import NONE
from .logprobs import Logprobs, logprobs_path
from .mixture import Mixture, MixtureSettings, mix, pass_rates
from .problems import Problem
from .recipe import OnPolicy, TeachSettings, Work
from .rows import Row
from .run import Run
from .scoring import score_samples, why_not_scored
from .teachers import Teacher, TeacherInfo, open_teacher
from .teachers.loading import weights_hash
from .teachers.worked import WORKED, WorkedTeacher
from .traces import Trace, TraceStore
from .train import TrainSettings, train

Until = Literal["samples", "teacher"] | None


@dataclass(frozen=True)
class RoundSettings:
    """What a round does. `n_problems` new ones are answered `samples` times each; None of `max_tokens` is scoring's."""

    n_problems: int = 500
    samples: int = 4
    on_policy: OnPolicy = "auto"
    temperature: float = 1.0
    top_logprobs: int = 64
    epochs: int = 2
    lr_scale: float = 0.5


@dataclass(frozen=True)
class Round:
    """One round of a run: which, in what folder, and from which student to which."""

    number: int
    folder: Path
    student: Path
    out: Path

    @property
    def samples_path(self) -> Path:
        """The student's answers."""
        return self.folder / "samples.jsonl"

    @property
    def scores_path(self) -> Path:
        """The teacher's log-probabilities of the samples."""
        return self.folder / "scores.bin"

    @property
    def own_scores_path(self) -> Path:
        """The student's log-probabilities of its own tokens (policy gradient)."""
        return self.folder / "own_scores.bin"

    @property
    def corrections_path(self) -> Path:
        """The teacher's answers to what the student could not solve."""
        return self.folder / "corrections.jsonl"


def rounds_of(run: Run, n: int) -> list[Round]:
    """Return the rounds of a run: each starts from the student before it, and the last one makes `student/`."""
    folders = [run.folder / "rounds" / str(i) for i in range(n + 1)]
    students = [folder / "student" for folder in folders[:-1]] + [run.student_dir]
    return [Round(i, folders[i], students[i - 1], students[i]) for i in range(1, n + 1)]


def problems_of(round_: Round, problems: Sequence[Problem], n: int, n_asked: int) -> list[Problem]:
    """Return the problems of a round: new ones after those that the teacher was asked, and these again if none is new.

    Only what a grader can judge is answered.
    """
    graded = [problem for problem in problems if problem.grader != NONE]
    if not graded:
        raise ArtifactError("rounds need problems with an answer to grade by", "leave --rounds out")
    first = (n_asked + (round_.number - 1) * n) % len(graded)
    return [graded[(first + i) % len(graded)] for i in range(min(n, len(graded)))]


def answer(
    round_: Round,
    problems: Sequence[Problem],
    settings: RoundSettings,
    max_tokens: int,
    seed: int,
    work: Work,
    say: Progress,
) -> list[Trace]:
    """Have the student answer, and grade what it says; what is there already is not answered again."""
    sampling = Sampling(temperature=settings.temperature, seed=seed, max_tokens=max_tokens)
    with TraceStore(round_.samples_path) as store, Grader() as grader:
        if len(store) and next(iter(store)).teacher.revision != weights_hash(round_.student):
            raise ArtifactError(
                f"the samples in {round_.folder} are of another student than {round_.student}",
                f"delete {round_.folder} to have this one answer",
            )
        collect(
            problems,
            store,
            # One more than there are samples is never reached: right ones do not end a problem.
            CollectSettings(f"round {round_.number}", sampling, settings.samples, settings.samples + 1, 1),
            open_teacher=lambda: work.open_student(round_.student),
            open_grader=lambda: grader,
            failures_path=round_.folder / "failures.jsonl",
            on_progress=lambda _, done, total, note: say(f"round {round_.number}, its own", done, total, note),
        )
        return list(store)


def ask_teacher(
    run: Run,
    round_: Round,
    problems: Sequence[Problem],
    samples: Sequence[Trace],
    tokenizer: Any,
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
                teacher,
                round_.scores_path,
                options.top_logprobs,
                on_progress,
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
            CollectSettings(settings.teacher, settings.teacher_sampling(), settings.samples, settings.keep),
            open_teacher=teacher,
            open_grader=lambda: grader,
            failures_path=round_.folder / "failures.jsonl",
            budget=Budget(work.limits, spent_before(run) if work.limits.price else 0.0),
            on_progress=lambda _, done, total, note: on_progress(
                f"round {round_.number}, corrected", done, total, note
            ),
        )


def lessons_of(
    round_: Round,
    samples: Sequence[Trace],
    earlier: Sequence[Row],
    tokenizer: Any,
    options: RoundSettings,
    record: dict[str, Any],
    max_length: int,
    seed: int,
) -> Mixture:
    """Return the rows of a round from its artifacts.

    Raises:
        ArtifactError: there is nothing to learn from.
    """
    settings = MixtureSettings(options.on_policy, max_length=max_length, seed=seed)
    with ExitStack() as files:
        own = files.enter_context(Logprobs.open(logprobs_path(round_.samples_path)))
        scores = files.enter_context(Logprobs.open(round_.scores_path)) if record["scored"] else None
        mine = None
        if record["scored"] and options.on_policy == "policy-gradient":
            _score_own(round_, samples)
            mine = files.enter_context(Logprobs.open(round_.own_scores_path))
        corrections = list(TraceStore.read(round_.corrections_path))
        mixture = mix(tokenizer, samples, own, scores, corrections, earlier, settings, mine)
    if not mixture.lessons:
        raise ArtifactError(
            f"round {round_.number} has nothing to train on: no sample is right, and no correction either",
            "train longer before the first round, or give easier problems",
        )
    return mixture


def _score_own(round_: Round, samples: Sequence[Trace]) -> None:
    """Store the student's own log-probabilities of its tokens, as its sampling may have left them out."""
    with ExitStack() as opened:

        @cache
        def student() -> Teacher:
            return opened.enter_context(open_teacher(str(round_.student)))

        score_samples(samples, logprobs_path(round_.samples_path), student, round_.own_scores_path, 1)


def summary(mixture: Mixture, samples: Sequence[Trace]) -> dict[str, Any]:
    """Return what a round was like, for round.json."""
    rates = pass_rates(samples)
    return {
        "samples": len(samples),
        "right": sum(trace.verdict == "right" for trace in samples),
        "levels": counts(list(rates.values())),
        "rows": dict(mixture.counts),
    }


def go_round(
    run: Run,
    round_: Round,
    problems: Sequence[Problem],
    tokenizer: Any,
    earlier: Sequence[Row],
    settings: TeachSettings,
    options: RoundSettings,
    training: TrainSettings,
    work: Work,
    until: Until,
    on_progress: Progress,
) -> bool:
    """Go through a round from where it is; say whether it made its student, or `until` ended it before.

    Raises:
        DeepDistillError: see each part; what was done stays.
    """
    name = f"rounds/{round_.number}/round.json"
    samples = answer(round_, problems, options, settings.eval_max_tokens, settings.seed, work, on_progress)
    record = run.load(name) or {}
    if until == "samples" and not record.get("teacher_done"):
        work.say(f"round {round_.number} waits for the teacher: {len(samples)} samples in {round_.folder}")
        return False
    if not record.get("teacher_done"):
        record = ask_teacher(run, round_, problems, samples, tokenizer, settings, options, work, on_progress)
    if until == "teacher":
        work.say(f"the teacher's part of round {round_.number} is done: it is not needed to train")
        return False
    mixture = lessons_of(round_, samples, earlier, tokenizer, options, record, training.max_length, training.seed)
    record |= summary(mixture, samples)
    run.save(name, record)
    work.say(f"round {round_.number}: {record['right']} of {len(samples)} right; rows: {_listed(record['rows'])}")
    rows = arrange(mixture.lessons, training.batch_size, training.epochs, training.seed)
    report = train(
        round_.student,
        rows,
        tokenizer,
        training,
        round_.folder / "checkpoints",
        round_.out,
        on_progress,
        is_ordered=True,
        say=work.say,
    )
    run.save(name, record | {"training": dataclasses.asdict(report)})
    return True


def _listed(rows: dict[str, int]) -> str:
    return ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in rows.items())


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
