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
from collections.abc import Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any, Literal

from ....errors import ArtifactError
from ....localrun.core.generation import Sampling
from ....localrun.core.reporter import Progress, Relay
from ...curation.curate import apart_from
from ...curation.filters import CurateSettings
from ...graders.pool import Grader
from ...problems.load import load_problems
from ...recipe import Stage, TeachSettings, Work
from ...records import NONE, Problem, Trace
from ...run import Run
from ...teachers import Teacher
from ...teachers.huggingface.loading import weights_hash
from ...tokenizer import Tokenizer
from ...traces.collect import CollectSettings, collect
from ...traces.logprobs import Logprobs, logprobs_path
from ...traces.store import TraceStore
from ..curriculum import arrange, counts
from ..distributed import everywhere
from ..report import TrainSettings
from ..rows import Row
from ..stage import tokenizer_of
from ..train import TrainPaths, train
from .dataset import Mixture, MixtureSettings, mix, pass_rates
from .round import Round, RoundSettings, rounds_of
from .teacher import ask_teacher, score_samples

__all__ = ["Round", "RoundSettings", "go_round", "problems_of", "rounds_of"]

Until = Literal["samples", "teacher"] | None


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
            settings=CollectSettings(f"round {round_.number}", sampling, settings.samples, settings.samples + 1, 1),
            open_teacher=lambda: work.open_student(round_.student),
            grader=grader,
            report=Relay(lambda _, done, total, note: say(f"round {round_.number}, its own", done, total, note)),
        )
        return list(store)


def lessons_of(
    round_: Round,
    samples: Sequence[Trace],
    earlier: Sequence[Row],
    tokenizer: Tokenizer,
    options: RoundSettings,
    record: dict[str, Any],
    training: TrainSettings,
    work: Work,
) -> Mixture:
    """Return the rows of a round from its artifacts.

    Raises:
        ArtifactError: there is nothing to learn from.
    """
    settings = MixtureSettings(
        options.on_policy,
        max_length=training.max_length,
        too_long=training.too_long,
        reasoning_weight=training.reasoning_weight,
        answer_weight=training.answer_weight,
        seed=training.seed,
    )
    with ExitStack() as files:
        own = files.enter_context(Logprobs.open(logprobs_path(round_.samples_path)))
        scores = files.enter_context(Logprobs.open(round_.scores_path)) if record["scored"] else None
        mine = None
        if record["scored"] and options.on_policy == "policy-gradient":
            _score_own(round_, samples, work)
            mine = files.enter_context(Logprobs.open(round_.own_scores_path))
        corrections = list(TraceStore.read(round_.corrections_path))
        mixture = mix(tokenizer, samples, own, scores, corrections, earlier, settings, mine)
    if not mixture.lessons:
        raise ArtifactError(
            f"round {round_.number} has nothing to train on: no sample is right, and no correction either",
            "train longer before the first round, or give easier problems",
        )
    return mixture


def _score_own(round_: Round, samples: Sequence[Trace], work: Work) -> None:
    """Store the student's own log-probabilities of its tokens, as its sampling may have left them out."""
    with ExitStack() as opened:

        @cache
        def student() -> Teacher:
            return opened.enter_context(work.open_student(round_.student))

        path = logprobs_path(round_.samples_path)
        score_samples(samples, path, teacher=student, out=round_.own_scores_path, top_logprobs=1)


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
    tokenizer: Tokenizer,
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
    mixture = lessons_of(round_, samples, earlier, tokenizer, options, record, training, work)
    record |= summary(mixture, samples)
    run.save(name, record)
    work.say(f"round {round_.number}: {record['right']} of {len(samples)} right; rows: {_listed(record['rows'])}")
    rows = arrange(mixture.lessons, training.batch_size, training.epochs, training.seed)
    result = everywhere(
        train,
        TrainPaths(round_.student, round_.folder / "checkpoints", round_.out),
        rows,
        tokenizer=tokenizer,
        settings=training,
        device=work.device,
        own={"report": Relay(on_progress, work.say)},
    )
    run.save(name, record | {"training": dataclasses.asdict(result)})
    return True


def _listed(rows: dict[str, int]) -> str:
    return ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in rows.items())


def go_rounds(
    run: Run,
    base: Path,
    earlier: list[Row],
    held_out: list[Problem],
    filters: CurateSettings,
    settings: TeachSettings,
    work: Work,
    stop_after: Stage | None,
    on_progress: Progress,
) -> bool:
    """Go through the rounds that are not done; say whether all are, or `stop_after` ended it before."""
    if run.student_dir.exists() or not settings.rounds:
        return True
    options = RoundSettings(settings.round_problems, settings.round_samples, settings.on_policy_loss)
    n_problems = settings.n_traces + settings.rounds * options.n_problems
    problems = load_problems(settings.problems, "train", n=n_problems, seed=settings.seed, offline=work.offline)
    problems = apart_from(problems, held_out, filters, work.say)
    for round_ in rounds_of(run, settings.rounds):
        if round_.out.exists():
            continue
        first = TrainSettings(**settings.stage_training(), seed=settings.seed + round_.number)
        training = dataclasses.replace(
            first,
            lr=first.peak_lr * options.lr_scale,
            epochs=first.epochs if first.minutes is not None else options.epochs,
        )
        asked = problems_of(round_, problems, options.n_problems, settings.n_traces)
        until = stop_after if stop_after in ("samples", "teacher") else None
        if not go_round(
            run, round_, asked, tokenizer_of(base), earlier, settings, options, training, work, until, on_progress
        ):
            return False
    return True
