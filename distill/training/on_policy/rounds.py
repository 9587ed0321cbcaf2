"""On-policy rounds: the student answers, graders judge, the teacher scores and corrects, the student trains on that.

A student that only imitates never sees its own mistakes. A round shows it what the teacher would have written after
the student's own beginning. Every part of a round is an artifact in `rounds/N/`: `samples.jsonl` (the student's
answers with their seeds), `scores.bin` (the teacher's log-probabilities of them), `corrections.jsonl`, `round.json`,
and the trained student. So a killed round resumes, and only the teacher's part needs the machine with the teacher:
`--stop-after samples`, copy the run to it, `--stop-after teacher`, copy the run back.

Source: GKD, arXiv 2306.13649; training on one's own correct answers is R1's rejection sampling (arXiv 2501.12948).
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
from ...context import Context
from ...curation.curate import apart_from
from ...graders.pool import Grader
from ...problems.instruction import shared_system
from ...problems.load import load_problems
from ...recipe.teach import TeachRecipe
from ...recipe.training import TrainingRecipe
from ...records import NONE, Problem, Trace, messages_of
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
from ..train import TrainPaths, TrainReport, train
from .dataset import Mixture, SampleLogprobs, mix, pass_rates
from .round import Round, rounds_of
from .teacher import ask_teacher, score_samples


def problems_of(round_: Round, problems: Sequence[Problem], *, n: int, n_asked: int) -> list[Problem]:
    """Return the n problems of a round, those after the ones that came before; at the end of the list it starts over.

    Only problems with a grader are among them, of which there are some. The teacher was asked the first `n_asked`.
    """
    graded = [problem for problem in problems if problem.grader != NONE]
    first = (n_asked + (round_.number - 1) * n) % len(graded)
    return [graded[(first + i) % len(graded)] for i in range(min(n, len(graded)))]


def go_rounds(context: Context, *, earlier: Sequence[Row], held_out: list[Problem], base: Path) -> bool:
    """Run the rounds that are not done; return False if `stop_after` ended them early.

    `earlier` holds the rows of the first training, some of which are replayed.
    """
    run, recipe = context.run, context.recipe
    if run.student_dir.exists():
        return True
    n, n_rounds = recipe.on_policy.n_problems, recipe.on_policy.rounds
    n_problems = recipe.traces.n + n_rounds * n
    problems = load_problems(
        recipe.problems,
        "train",
        n=n_problems,
        seed=recipe.seed,
        offline=context.resources.offline,
        asking=recipe.asking,
    )
    problems = apart_from(problems, held_out, filters=recipe.curation, report=context.report)
    tokenizer = tokenizer_of(base, shared_system(map(messages_of, problems)))
    for round_ in rounds_of(run, n_rounds):
        if round_.out.exists():
            continue
        asked = problems_of(round_, problems, n=n, n_asked=recipe.traces.n)
        if not go_round(context, round_, problems=asked, earlier=earlier, tokenizer=tokenizer):
            return False
    return True


def go_round(
    context: Context, round_: Round, *, problems: Sequence[Problem], earlier: Sequence[Row], tokenizer: Tokenizer
) -> bool:
    """Run a round from where it stopped; return False if `stop_after` ended it before its student was trained.

    Raises:
        DeepDistillError: see each part; what is done stays.
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
        report.say(f"the teacher's part of round {round_.number} is done: its training needs no teacher")
        return False
    mixture = lessons_of(
        context, round_, samples=samples, earlier=earlier, tokenizer=tokenizer, is_scored=record["scored"]
    )
    record |= summary(mixture, samples)
    run.save(name, record)
    report.say(f"round {round_.number}: {record['right']} of {len(samples)} right; rows: {_listed(record['rows'])}")
    trained = _train_round(context, round_, mixture=mixture, tokenizer=tokenizer)
    run.save(name, record | {"training": dataclasses.asdict(trained)})
    return True


def _train_round(context: Context, round_: Round, *, mixture: Mixture, tokenizer: Tokenizer) -> TrainReport:
    """Train the round's student on its rows, in the order of its curriculum."""
    training = round_training(context.recipe, round_.number)
    return everywhere(
        train,
        TrainPaths(round_.student, round_.folder / "checkpoints", round_.out),
        arrange(mixture.lessons, training),
        tokenizer=tokenizer,
        settings=training,
        device=context.resources.device,
        first_only={"report": context.report},
    )


def round_training(recipe: TeachRecipe, number: int) -> TrainingRecipe:
    """Return the settings of a round's training: fewer epochs than the first one's, at a lower learning rate."""
    first = recipe.one_training(number)
    return dataclasses.replace(
        first,
        learning_rate=first.peak_lr * recipe.on_policy.lr_scale,
        epochs=first.epochs if first.minutes is not None else recipe.on_policy.epochs,
    )


def answer(context: Context, round_: Round, problems: Sequence[Problem]) -> list[Trace]:
    """Return the student's graded answers to the problems; it is asked only for those that are not stored yet.

    Raises:
        ArtifactError: `code` "student-differs": another student wrote the stored ones.
    """
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
            settings=CollectSettings(
                f"round {round_.number}",
                sampling,
                n_samples,
                keep=n_samples + 1,  # more than there are, so that a problem never ends early
                top_logprobs=1,
                stage=f"round {round_.number}, student",
            ),
            open_teacher=lambda: context.open_student(round_.student),
            grader=grader,
            report=context.report,
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
        sampled = files.enter_context(Logprobs(logprobs_path(round_.samples_path)))
        teacher = files.enter_context(Logprobs(round_.scores_path)) if is_scored else None
        student = None
        if is_scored and options.loss == "policy-gradient":
            _score_own(context, round_, samples)
            student = files.enter_context(Logprobs(round_.own_scores_path))
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
            f"round {round_.number} has nothing to train on: neither a sample nor a correction is right",
            "train longer before the first round, or give easier problems",
            code="nothing-to-train",
        )
    return mixture


def _score_own(context: Context, round_: Round, samples: Sequence[Trace]) -> None:
    """Store the student's log-probabilities of its own tokens, which sampling need not have stored."""
    with ExitStack() as opened:

        @cache
        def student() -> Teacher:
            return opened.enter_context(context.open_student(round_.student))

        path = logprobs_path(round_.samples_path)
        score_samples(samples, path, teacher=student, out=round_.own_scores_path, top_logprobs=1)


def summary(mixture: Mixture, samples: Sequence[Trace]) -> dict[str, Any]:
    """Return the counts of a round that round.json keeps."""
    rates = pass_rates(samples)
    return {
        "samples": len(samples),
        "right": sum(trace.verdict == "right" for trace in samples),
        "levels": counts(list(rates.values())),
        "rows": dict(mixture.counts),
    }


def _listed(rows: dict[str, int]) -> str:
    return ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in rows.items())
