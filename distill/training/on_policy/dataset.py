"""What a round teaches: the student's own answers and what the teacher made of them, as rows.

A right answer of its own is worth imitating, the shortest of a problem's first. Where it rarely succeeds the teacher's
own answer is shown. Where the teacher scored the student's tokens, every sample is taught, wrong ones too, by what the
teacher would have said in the student's place. What goes in circles becomes a negative.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ....localrun.core.generation import TopLogprobs
from ....localrun.core.loops import Loop, find_loop
from ...recipe.training import OnPolicyRecipe, TrainingRecipe
from ...records import Trace
from ...tokenizer import Tokenizer
from ...traces.logprobs import Logprobs
from ..dataset import mixture, row_of
from ..rows import Row

Lesson = tuple[Row, float | None]
"""A row, and the pass rate of its problem (see curriculum)."""

_MOST_ADVANTAGE = 5.0  # nats: a token that the teacher all but rules out says no more than that
_MOST_NEGATIVES = 64  # tokens of one sample: a loop of 500 teaches no more than its beginning
_REPLAYED = 1.0  # earlier rows count as easy: half of them come in each pass


@dataclass(frozen=True)
class SampleLogprobs:
    """Log-probabilities of the samples' tokens by their ids: as sampled, the teacher's, and the student's own.

    The first also has the token ids; the teacher's are None where it cannot score; only the policy gradient needs the
    student's.
    """

    sampled: Logprobs
    teacher: Logprobs | None = None
    student: Logprobs | None = None


@dataclass
class Mixture:
    """The rows of a round with their problems' pass rates, and how many there are of each kind."""

    lessons: list[Lesson] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, kind: str, row: Row, *, rate: float | None, max_length: int) -> None:
        """Take a row in unless it is too long, which is counted."""
        if len(row.input_ids) > max_length:
            self.counts["too_long"] += 1
            return
        self.lessons.append((row, rate))
        self.counts[kind] += 1


def pass_rates(samples: Sequence[Trace]) -> dict[str, float]:
    """Return the share of right samples of each problem."""
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
    """Return the rows of a round: scored samples or correct ones, loops, the teacher's corrections, earlier rows."""
    rows, rates, limit = Mixture(), pass_rates(samples), training.max_length
    prompts: dict[str, list[int]] = {}
    shortest = _shortest_right(samples)
    for trace in samples:
        stored = logprobs.sampled.get(trace.id)
        if stored is None:
            continue
        ids, rate = stored[0].tolist(), rates[trace.problem_id]
        if trace.problem_id not in prompts:
            prompts[trace.problem_id] = _prompt_ids(tokenizer, trace)
        prompt, loop = prompts[trace.problem_id], find_loop(ids)
        if loop is not None:
            rows.add("loops", negative_row(prompt, ids, loop), rate=None, max_length=limit)
        if logprobs.teacher is not None and trace.id in logprobs.teacher and ids:
            n = len(ids) if loop is None else loop.first_repeat
            row = _scored_row(trace, prompt, ids=ids, n=n, logprobs=logprobs, options=options)
            rows.add("scored", row, rate=rate, max_length=limit)
        elif trace.id in shortest:
            rows.add("own_right", Row([*prompt, *ids], len(prompt)), rate=rate, max_length=limit)
    for trace in corrections:
        if trace.verdict == "right" and trace.finish_reason == "stop":
            row = row_of(tokenizer, trace, training)  # as the first training would have had it
            rows.add("corrected", row, rate=rates.get(trace.problem_id), max_length=limit)
    n_replayed = min(len(earlier), round(options.replay * len(rows.lessons)))
    for row in random.Random(training.seed or 0).sample(list(earlier), n_replayed):
        rows.add("replayed", row, rate=_REPLAYED, max_length=limit)
    return rows


def _shortest_right(samples: Sequence[Trace]) -> set[str]:
    """Return the ids of the shortest right answer to each problem, of those that ended and closed their thinking."""
    best: dict[str, tuple[int, str]] = {}
    for trace in samples:
        if trace.verdict == "right" and trace.finish_reason == "stop" and trace.reasoning_content:
            candidate = (trace.usage.completion, trace.id)
            best[trace.problem_id] = min(best.get(trace.problem_id, candidate), candidate)
    return {trace_id for _, trace_id in best.values()}


def _prompt_ids(tokenizer: Tokenizer, trace: Trace) -> list[int]:
    prompt = tokenizer.apply_chat_template(trace.messages, add_generation_prompt=True, tokenize=False)
    ids: list[int] = tokenizer(prompt, add_special_tokens=False).input_ids
    return ids


def _scored_row(
    trace: Trace, prompt: list[int], *, ids: list[int], n: int, logprobs: SampleLogprobs, options: OnPolicyRecipe
) -> Row:
    """Return a sample's first n tokens with the teacher's judgement of each; a right one is imitated too."""
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
    before, wanted = given_logprobs(student[1], ids)[:n], given_logprobs(teacher[1], ids)[:n]
    # A token that the teacher finds more likely than the student did was a good one, by as much.
    advantages = np.clip(wanted - before, -_MOST_ADVANTAGE, _MOST_ADVANTAGE)
    return Row(row_ids, len(prompt), losses=losses, advantages=advantages.tolist(), old_logprobs=before.tolist())


def given_logprobs(top: TopLogprobs, ids: Sequence[int]) -> Any:
    """Return the log-probability of each given token `[T]`, which a scored text always holds (see `Teacher.score`)."""
    is_given = top.ids == np.asarray(ids)[:, None]
    assert is_given.any(1).all(), "a scored text holds its own tokens"
    return top.values[np.arange(len(ids)), is_given.argmax(1)]


def negative_row(prompt: Sequence[int], tokens: Sequence[int], loop: Loop) -> Row:
    """Return the row that makes the repeating tokens of a sample less probable where they stood.

    The first time round may be meant, so only what repeats it is a negative; what came before is left alone.

    Source: unlikelihood training, arXiv 1908.04319, on the sequence level with the repeated n-gram as the negative.
    """
    end = min(len(tokens), loop.first_repeat + _MOST_NEGATIVES)
    is_negative = [float(i >= loop.first_repeat) for i in range(end)]
    return Row([*prompt, *tokens[:end]], len(prompt), losses=(("unlikelihood", 1.0),), weights=is_negative)
