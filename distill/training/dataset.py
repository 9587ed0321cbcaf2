"""The rows of the first training: curated traces as the student's template renders them, and the losses they carry.

If the student shares the teacher's vocabulary, the teacher's log-probabilities beside the traces become the target. A
trace that is too long for the student is counted and left out.
"""

from __future__ import annotations

import random
from bisect import bisect
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from difflib import SequenceMatcher
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ...errors import ArtifactError
from ...localrun.core.reporter import SILENT, Reporter
from ..recipe.training import TrainingRecipe
from ..records import Trace
from ..teachers.vocabulary import is_same
from ..tokenizer import Tokenizer, text_of
from ..traces.logprobs import Logprobs, logprobs_path
from .rows import Row, make_row

WITH_LOGITS = "rows carry the teacher's log-probabilities"
MISSING, OTHER_TOKENS = "have none in the sidecar", "are rendered as other tokens"
_LEAST_ALIGNED = 0.5  # share of a row's targets that are tokens of the teacher


def lessons(
    traces: Sequence[Trace],
    traces_path: Path,
    *,
    tokenizer: Tokenizer,
    training: TrainingRecipe,
    report: Reporter = SILENT,
) -> tuple[list[Row], list[Trace]]:
    """Return the rows of the traces that fit `training.max_length`, and those traces.

    Traces without any text are left out. With `too_long` "shorten" a trace that does not fit loses lines from the
    middle of its reasoning, never the closing tag or the answer.

    Raises:
        ArtifactError: `code` "traces-too-long": all of them are; "no-logits": `training.loss` needs
            log-probabilities that the traces lack.
    """
    limit = training.max_length
    with_text = [trace for trace in traces if trace.content.strip() or (trace.reasoning_content or "").strip()]
    rendered = [(row_of(tokenizer, trace, training), trace) for trace in with_text]
    fitting = [(row, trace) for row, trace in rendered if len(row.input_ids) <= limit]
    if not fitting:
        raise ArtifactError(f"every trace is longer than {limit} tokens", "raise --max-length", code="traces-too-long")
    rows, kept = [row for row, _ in fitting], [trace for _, trace in fitting]
    return _with_logits(rows, kept, path=traces_path, tokenizer=tokenizer, training=training, report=report), kept


def row_of(tokenizer: Tokenizer, trace: Trace, training: TrainingRecipe) -> Row:
    """Return the row of a trace, with the recipe's weights of reasoning and answer.

    With `too_long` "shorten" a row of more than `max_length` tokens loses as few lines as possible from the middle of
    its reasoning. A row that cannot be shortened that far is returned as it is.
    """

    def with_reasoning(reasoning: str) -> Row:
        weights = {"reasoning_weight": training.reasoning_weight, "answer_weight": training.answer_weight}
        return make_row(tokenizer, trace.messages, reasoning=reasoning, content=trace.content, **weights)

    def with_lines(n: int) -> Row:
        return with_reasoning("\n".join(lines[: (n + 1) // 2] + lines[len(lines) - n // 2 :]))

    row, lines = with_reasoning(trace.reasoning_content or ""), (trace.reasoning_content or "").splitlines()
    if training.too_long == "drop" or len(row.input_ids) <= training.max_length:
        return row
    n_kept = bisect(range(1, len(lines)), training.max_length, key=lambda n: len(with_lines(n).input_ids))
    return with_lines(n_kept) if n_kept else row


def _with_logits(
    rows: list[Row],
    traces: Sequence[Trace],
    *,
    path: Path,
    tokenizer: Tokenizer,
    training: TrainingRecipe,
    report: Reporter,
) -> list[Row]:
    """Return the rows, with the teacher's distribution if it was kept and the recipe's loss uses it."""
    path, loss = logprobs_path(path), training.loss
    if loss == "cross-entropy" or (loss == "auto" and not path.exists()):
        return rows
    with Logprobs(path) if path.exists() else nullcontext() as logprobs:
        reason = why_no_logits(logprobs, traces, tokenizer)
        if reason and loss == "logits":
            hint = "set training.loss to cross-entropy, or choose a student with the teacher's tokenizer"
            raise ArtifactError(f"training.loss=logits: {reason}", hint, code="no-logits")
        if reason or logprobs is None:
            report.say(f"{reason}: training on the tokens alone (cross-entropy)")
            return rows
        rows, counts = add_logits(rows, traces, logprobs=logprobs, share=training.logit_share)
    report.say("; ".join(f"{n} {what}" for what, n in counts.items()))
    return rows


def hold_out(rows: Sequence[Row], traces: Sequence[Trace], *, n: int, seed: int) -> tuple[list[int], list[Row]]:
    """Return the indices of the rows that train, and up to n validation rows, of problems that no training row has.

    They are from the training bucket, as all rows are. There are none if n is more than an eighth of the problems.
    """
    problems = sorted({trace.problem_id for trace in traces})
    if n < 1 or 8 * n > len(problems):
        return list(range(len(rows))), []
    held_out = set(random.Random(seed).sample(problems, n))
    trained = [i for i, trace in enumerate(traces) if trace.problem_id not in held_out]
    return trained, [row for row, trace in zip(rows, traces, strict=True) if trace.problem_id in held_out][:n]


def why_no_logits(logprobs: Logprobs | None, traces: Sequence[Trace], tokenizer: Tokenizer) -> str | None:
    """Return why the student cannot learn from these traces' log-probabilities; None if it can."""
    if logprobs is None:
        return "the traces have no log-probabilities beside them (--logprobs 64 keeps them)"
    having = [trace for trace in traces if trace.id in logprobs]
    if not having:
        return "no trace to train on has log-probabilities"
    for known in {trace.teacher.vocabulary for trace in having}:
        if is_same(known, tokenizer) is False:
            return "the student's tokenizer is not the teacher's: the log-probabilities are of other tokens"
    for trace in having[:20]:  # a recorded vocabulary may be wrong or missing: the tokens must decode to the text
        stored = logprobs.get(trace.id)
        if stored is not None and not _reads_as(tokenizer, stored[0], trace):
            return "the student's tokenizer reads the teacher's tokens as another text"
    return None


def add_logits(
    rows: Sequence[Row], traces: Sequence[Trace], *, logprobs: Logprobs, share: float
) -> tuple[list[Row], Counter[str]]:
    """Return the rows of these traces, with forward KL as `share` of the loss if the sidecar has the distribution.

    The counts say how many rows have it, and why others do not.

    The sidecar has the teacher's tokens, the row those of the student's template. Where they agree, the target is the
    teacher's distribution; a token that only the template has, such as a newline, is its own target.

    Raises:
        ArtifactError: a record of the sidecar is broken.
    """
    counts, with_logits = Counter({WITH_LOGITS: 0}), list[Row]()
    for row, trace in zip(rows, traces, strict=True):
        stored, outcome = logprobs.get(trace.id), MISSING
        if stored is not None:
            place = _places(list(row.input_ids[row.n_prompt :]), stored[0].tolist())
            outcome = OTHER_TOKENS if place is None else WITH_LOGITS
            if place is not None:
                row = replace(row, losses=mixture("forward_kl", share), top=logprobs.stored(trace.id, place))
        counts[outcome] += 1
        with_logits.append(row)
    return with_logits, counts


def mixture(name: str, share: float) -> tuple[tuple[str, float], ...]:
    """Return the losses of a row: `share` of the named one, and cross-entropy for the rest."""
    parts = ((name, share), ("cross_entropy", 1 - share))
    return tuple(part for part in parts if part[1] > 0)


def _places(targets: list[int], tokens: list[int]) -> list[int] | None:
    """Return for each target the index of the teacher's token that it is, or -1; None if too few are."""
    n = len(targets)
    start = next((i for i in range(len(tokens) - n + 1) if tokens[i : i + n] == targets), None)
    if start is not None:
        return list(range(start, start + n))
    place = [-1] * n
    for block in SequenceMatcher(None, targets, tokens, autojunk=False).get_matching_blocks():
        place[block.a : block.a + block.size] = range(block.b, block.b + block.size)
    return place if sum(at >= 0 for at in place) >= _LEAST_ALIGNED * n else None


def _reads_as(tokenizer: Tokenizer, ids: npt.NDArray[np.int32], trace: Trace) -> bool:
    if len(tokenizer) <= int(ids.max(initial=0)):
        return False
    text = text_of(tokenizer, ids.tolist())
    return trace.content.strip() in text and (trace.reasoning_content or "").strip() in text
