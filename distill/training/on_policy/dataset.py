"""The rows of a round, made of the student's samples and of what the teacher said to them.

The student imitates its shortest correct answer to each problem, and the teacher's answer where it rarely succeeds
itself. If the teacher scored the samples, the student learns from every one, wrong ones too: each token is compared
with what the teacher would have written there. A sample that repeats itself becomes a negative.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ....localrun.core.generation import TopLogprobs
from ....localrun.core.loops import Loop, find_loop
from ...recipe.training import OnPolicyRecipe, TrainingRecipe
from ...records import Trace
from ...tokenizer import Tokenizer, ids_of, prompt_of
from ...traces.logprobs import Logprobs
from ..dataset import mixture, row_of
from ..rows import Row

Lesson = tuple[Row, float | None]
"""A row, and the pass rate of its problem (see curriculum)."""

_MOST_ADVANTAGE = 5.0  # nats: one token that the teacher all but rules out must not outweigh all others
_MOST_NEGATIVES = 64  # tokens per sample: a loop of 500 teaches no more than its beginning
_REPLAYED = 1.0  # the pass rate of earlier rows: they count as easy, so half of them come in each epoch


@dataclass(frozen=True)
class SampleLogprobs:
    """Log-probabilities of the samples' tokens, by the samples' ids.

    `sampled` were stored while sampling and have the token ids; `teacher` is None if it cannot score; `student` holds
    the student's own, which only the policy gradient needs.
    """

    sampled: Logprobs
    teacher: Logprobs | None = None
    student: Logprobs | None = None


@dataclass
class Mixture:
    """The rows of a round with their problems' pass rates, and how many there are of each kind."""

    max_length: int  # tokens
    lessons: list[Lesson] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, kind: str, row: Row, rate: float | None) -> None:
        """Add a row, or count it as too long."""
        if len(row.input_ids) > self.max_length:
            self.counts["too_long"] += 1
            return
        self.lessons.append((row, rate))
        self.counts[kind] += 1


def pass_rates(samples: Sequence[Trace]) -> dict[str, float]:
    """Return the share of each problem's samples that are right."""
    verdicts: dict[str, list[bool]] = defaultdict(list)
    for trace in samples:
        verdicts[trace.problem_id].append(trace.verdict == "right")
    return {problem: sum(right) / len(right) for problem, right in verdicts.items()}


def mix(
    tokenizer: Tokenizer,
    samples: Sequence[Trace],
    *,
    logprobs: SampleLogprobs,
    corrections: Sequence[Trace] = (),
    earlier: Sequence[Row] = (),
    options: OnPolicyRecipe = OnPolicyRecipe(),  # noqa: B008 - frozen
    training: TrainingRecipe = TrainingRecipe(),  # noqa: B008 - frozen
) -> Mixture:
    """Return the rows of a round: scored or correct samples, loops, the teacher's corrections, earlier rows."""
    mixed, rates = Mixture(training.max_length), pass_rates(samples)
    _add_samples(mixed, samples, tokenizer=tokenizer, rates=rates, logprobs=logprobs, options=options)
    for trace in corrections:
        if trace.verdict == "right" and trace.finish_reason == "stop":
            row = row_of(tokenizer, trace, training)  # as in the first training
            mixed.add("corrected", row, rates.get(trace.problem_id))
    n_replayed = min(len(earlier), round(options.replay * len(mixed.lessons)))
    for row in random.Random(training.seed or 0).sample(list(earlier), n_replayed):
        mixed.add("replayed", row, _REPLAYED)
    return mixed


def _add_samples(
    mixed: Mixture,
    samples: Sequence[Trace],
    *,
    tokenizer: Tokenizer,
    rates: Mapping[str, float],
    logprobs: SampleLogprobs,
    options: OnPolicyRecipe,
) -> None:
    """Add what the student learns from its own samples; one whose tokens were not stored is left out."""
    prompts: dict[str, list[int]] = {}
    shortest = _shortest_right(samples)
    for trace in samples:
        stored = logprobs.sampled.get(trace.id)
        if stored is None:
            continue
        ids, rate = stored[0].tolist(), rates[trace.problem_id]
        if trace.problem_id not in prompts:
            prompts[trace.problem_id] = ids_of(tokenizer, prompt_of(tokenizer, trace.messages))
        prompt, loop = prompts[trace.problem_id], find_loop(ids)
        if loop is not None:
            mixed.add("loops", negative_row(prompt, ids, loop), None)
        if logprobs.teacher is not None and trace.id in logprobs.teacher and ids:
            n = len(ids) if loop is None else loop.first_repeat
            mixed.add("scored", _scored_row(trace, prompt, ids=ids, n=n, logprobs=logprobs, options=options), rate)
        elif trace.id in shortest:
            mixed.add("own_right", Row([*prompt, *ids], len(prompt)), rate)


def _shortest_right(samples: Sequence[Trace]) -> set[str]:
    """Return the id of the shortest right answer to each problem, among those that ended and closed their thinking."""
    best: dict[str, tuple[int, str]] = {}
    for trace in samples:
        if trace.verdict == "right" and trace.finish_reason == "stop" and trace.reasoning_content:
            candidate = (trace.usage.completion, trace.id)
            best[trace.problem_id] = min(best.get(trace.problem_id, candidate), candidate)
    return {trace_id for _, trace_id in best.values()}


def _scored_row(
    trace: Trace, prompt: list[int], *, ids: list[int], n: int, logprobs: SampleLogprobs, options: OnPolicyRecipe
) -> Row:
    """Return the row of a sample's first n tokens with the teacher's scores; a right sample is imitated, too."""
    scores = logprobs.teacher
    assert scores is not None, "the teacher scored the sample"
    name = options.loss.replace("-", "_") if options.loss != "auto" else "reverse_kl"
    share = 1 - options.imitation_share if trace.verdict == "right" else 1.0
    row_ids, losses = [*prompt, *ids[:n]], mixture(name, share)
    if name != "policy_gradient":
        return Row(row_ids, len(prompt), losses=losses, top=scores.stored(trace.id, range(n)))
    teacher, student = scores.get(trace.id), logprobs.student.get(trace.id) if logprobs.student else None
    assert student is not None, "the policy gradient compares with the student's own log-probabilities"
    assert teacher is not None
    by_student, by_teacher = given_logprobs(student[1], ids)[:n], given_logprobs(teacher[1], ids)[:n]
    # log p - log q of a token sampled from the student q: its mean is -KL(q || p), so raising it lowers the reverse KL
    advantages = np.clip(by_teacher - by_student, -_MOST_ADVANTAGE, _MOST_ADVANTAGE)
    return Row(row_ids, len(prompt), losses=losses, advantages=advantages.tolist(), old_logprobs=by_student.tolist())


def given_logprobs(top: TopLogprobs, ids: Sequence[int]) -> Any:
    """Return the log-probability of each given token `[T]`, which a scored text always holds (see `Teacher.score`)."""
    is_given = top.ids == np.asarray(ids)[:, None]
    assert is_given.any(1).all(), "a scored text holds its own tokens"
    return top.values[np.arange(len(ids)), is_given.argmax(1)]


def negative_row(prompt: Sequence[int], tokens: Sequence[int], loop: Loop) -> Row:
    """Return the row that makes the repeated tokens of a sample less probable where they are.

    The first occurrence may be meant, so only its repetitions are negatives; the tokens before carry no loss.

    Source: unlikelihood training, arXiv 1908.04319, on the sequence level with the repeated n-gram as the negative.
    """
    end = min(len(tokens), loop.first_repeat + _MOST_NEGATIVES)
    is_negative = [float(i >= loop.first_repeat) for i in range(end)]
    return Row([*prompt, *tokens[:end]], len(prompt), losses=(("unlikelihood", 1.0),), weights=is_negative)
