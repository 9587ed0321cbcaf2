"""On-policy rounds: the student answers, graders judge, the teacher corrects and scores, the student trains on that.

A student that only imitates never sees its own mistakes. A round shows it what the teacher would have said where the
student went its own way. Every part of a round is an artifact in `rounds/N/`: `samples.jsonl` (the student's answers
with their seeds), `scores.bin` (the teacher's log-probabilities of them), `corrections.jsonl`, `round.json`, and the
student that it made. So a killed round resumes, and the machine with the teacher is needed for its part alone:
`--stop-after samples`, copy the run there, `--stop-after teacher`, copy it back.

Source: on-policy distillation, GKD arXiv 2306.13649; own right answers, rejection sampling as in R1 (arXiv 2501.12948).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

from ....errors import ArtifactError
from ....localrun.core.generation import Sampling
from ....localrun.core.reporter import Relay
from ...context import Context
from ...curation.curate import apart_from
from ...graders.pool import Grader
from ...problems.load import load_problems
from ...recipe.teach import TeachRecipe
from ...recipe.training import TrainingRecipe
from ...records import NONE, Problem, Trace
from ...teachers import Teacher
from ...teachers.huggingface.loading import weights_hash
from ...tokenizer import Tokenizer
from ...traces.collect import CollectSettings, collect
from ...traces.logprobs import Logprobs, logprobs_path
from ...traces.store import TraceStore
from ..curriculum import arrange, counts
from ..distributed import everywhere
from ..rows import Row
from ..stage import tokenizer_of
from ..train import TrainPaths, train
from .dataset import Mixture, SampleLogprobs, mix, pass_rates
from .round import Round, rounds_of
from .teacher import ask_teacher, score_samples


def problems_of(round_: Round, problems: Sequence[Problem], *, n: int, n_asked: int) -> list[Problem]:
    """Return the n problems of a round: new ones after those that the teacher was asked, or these again if none is new.

    Only problems with a grader are answered.
    """
    graded = [problem for problem in problems if problem.grader != NONE]
    if not graded:
        raise ArtifactError("rounds need problems with an answer to grade by", "leave --rounds out", code="no-answers")
    first = (n_asked + (round_.number - 1) * n) % len(graded)
    return [graded[(first + i) % len(graded)] for i in range(min(n, len(graded)))]


def go_rounds(context: Context, *, earlier: Sequence[Row], held_out: list[Problem], base: Path) -> bool:
    """Run the rounds that are not done; return whether all are, or `stop_after` ended them before.

    `earlier` holds the rows of the first training, some of which are replayed.
    """
    run, recipe = context.run, context.recipe
    if run.student_dir.exists():
        return True
    n, n_rounds = recipe.on_policy.n_problems, recipe.on_policy.rounds
    n_problems = recipe.traces.n + n_rounds * n
    problems = load_problems(
        recipe.problems, "train", n=n_problems, seed=recipe.seed, offline=context.resources.offline
    )
    problems = apart_from(problems, held_out, filters=recipe.curation, report=context.report)
    for round_ in rounds_of(run, n_rounds):
        if round_.out.exists():
            continue
        asked = problems_of(round_, problems, n=n, n_asked=recipe.traces.n)
        if not go_round(context, round_, problems=asked, earlier=earlier, tokenizer=tokenizer_of(base)):
            return False
    return True


def go_round(
    context: Context, round_: Round, *, problems: Sequence[Problem], earlier: Sequence[Row], tokenizer: Tokenizer
) -> bool:
    """Resume a round where it is; return whether it made its student, or `stop_after` ended it before.

    Raises:
        DeepDistillError: see each part; what was done stays.
    """
    run, report = context.run, context.report
    name = f"rounds/{round_.number}/round.json"
    samples = answer(context, round_, problems)
    record = run.load(name) or {}
    if context.stop_after == "samples" and not record.get("teacher_done"):
        report.say(f"round {round_.number} waits for the teacher: {len(samples)} samples in {round_.folder}")
        return False
    if not record.get("teacher_done"):
        record = ask_teacher(context, round_, problems=problems, samples=samples, tokenizer=tokenizer)
    if context.stop_after == "teacher":
        report.say(f"the teacher's part of round {round_.number} is done: training needs no teacher")
        return False
    training = round_training(context.recipe, round_.number)
    mixture = lessons_of(
        context, round_, samples=samples, earlier=earlier, tokenizer=tokenizer, is_scored=record["scored"]
    )
    record |= summary(mixture, samples)
    run.save(name, record)
    report.say(f"round {round_.number}: {record['right']} of {len(samples)} right; rows: {_listed(record['rows'])}")
    seed = training.seed or 0
    settings, epochs = training.curriculum, training.epochs
    rows = arrange(mixture.lessons, training.batch_size, epochs=epochs, seed=seed, settings=settings)
    trained = everywhere(
        train,
        TrainPaths(round_.student, round_.folder / "checkpoints", round_.out),
        rows,
        tokenizer=tokenizer,
        settings=training,
        device=context.resources.device,
        own={"report": report},
    )
    run.save(name, record | {"training": dataclasses.asdict(trained)})
    return True


def round_training(recipe: TeachRecipe, number: int) -> TrainingRecipe:
    """Return the settings of a round's training: fewer epochs than the first one's, at a lower learning rate."""
    first = recipe.one_training(number)
    return dataclasses.replace(
        first,
        learning_rate=first.peak_lr * recipe.on_policy.lr_scale,
        epochs=first.epochs if first.minutes is not None else recipe.on_policy.epochs,
    )


def answer(context: Context, round_: Round, problems: Sequence[Problem]) -> list[Trace]:
    """Have the student answer, and grade what it says; what is stored is not answered again."""
    recipe = context.recipe
    sampling = Sampling(temperature=recipe.on_policy.temperature, seed=recipe.seed, max_tokens=recipe.scores.max_tokens)
    n_samples = recipe.on_policy.samples
    with TraceStore(round_.samples_path) as store, Grader() as grader:
        if len(store) and next(iter(store)).teacher.revision != weights_hash(round_.student):
            raise ArtifactError(
                f"the samples in {round_.folder} are of another student than {round_.student}",
                f"delete {round_.folder} to have this one answer",
                code="student-differs",
            )
        collect(
            problems,
            store,
            # One more than there are samples is never reached: right ones do not end a problem.
            settings=CollectSettings(f"round {round_.number}", sampling, n_samples, n_samples + 1, 1),
            open_teacher=lambda: context.open_student(round_.student),
            grader=grader,
            report=Relay(
                lambda _, done, total, note: context.report.progress(
                    f"round {round_.number}, its own", done, total=total, note=note
                )
            ),
        )
        return list(store)


def lessons_of(
    context: Context,
    round_: Round,
    *,
    samples: Sequence[Trace],
    earlier: Sequence[Row],
    tokenizer: Tokenizer,
    is_scored: bool,
) -> Mixture:
    """Return the rows of a round from its artifacts; `is_scored` says whether the teacher scored the samples.

    Raises:
        ArtifactError: `code` "nothing-to-train": there is nothing to learn from.
    """
    options, training = context.recipe.on_policy, context.recipe.one_training(round_.number)
    with ExitStack() as files:
        sampled = files.enter_context(Logprobs.open(logprobs_path(round_.samples_path)))
        teacher = files.enter_context(Logprobs.open(round_.scores_path)) if is_scored else None
        student = None
        if is_scored and options.loss == "policy-gradient":
            _score_own(context, round_, samples)
            student = files.enter_context(Logprobs.open(round_.own_scores_path))
        mixture = mix(
            tokenizer,
            samples,
            logprobs=SampleLogprobs(sampled, teacher, student),
            corrections=list(TraceStore.read(round_.corrections_path)),
            earlier=earlier,
            options=options,
            training=training,
        )
    if not mixture.lessons:
        raise ArtifactError(
            f"round {round_.number} has nothing to train on: no sample is right, and no correction either",
            "train longer before the first round, or give easier problems",
            code="nothing-to-train",
        )
    return mixture


def _score_own(context: Context, round_: Round, samples: Sequence[Trace]) -> None:
    """Store the student's own log-probabilities of its tokens, which its sampling may have left out."""
    with ExitStack() as opened:

        @cache
        def student() -> Teacher:
            return opened.enter_context(context.open_student(round_.student))

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


def _listed(rows: dict[str, int]) -> str:
    return ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in rows.items())
