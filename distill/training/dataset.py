"""The rows of the first training: curated traces as the student's template renders them, with what they carry.

Log-probabilities beside the traces become the loss where the student shares the teacher's vocabulary; the student's own
pass rate decides which problem comes when. What is too long for the student is counted and left out.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Literal

from ...errors import ArtifactError
from ..recipe import Loss, Work
from ..records import Trace
from ..tokenizer import Tokenizer
from ..traces.logprobs import Logprobs, logprobs_path
from .curriculum import arrange, estimated
from .logit_rows import add_logits, refuse, why_no_logits
from .rows import Row, make_row, shortened


def lessons(
    traces: Sequence[Trace],
    traces_path: Path,
    tokenizer: Tokenizer,
    *,
    max_length: int,
    loss: Loss,
    logit_share: float,
    work: Work,
    weights: Mapping[str, float] | None = None,
    too_long: Literal["drop", "shorten"] = "drop",
) -> tuple[list[Row], list[Trace]]:
    """Return the rows of the traces that fit, and those traces. `weights` are `make_row`'s, by their names.

    Traces without any text are left out. With `too_long` "shorten" what does not fit loses lines from the middle of its
    reasoning, never the closing tag or the answer.

    Raises:
        ArtifactError: every trace is too long, or logits are asked for that cannot be had.
    """
    said = [trace for trace in traces if trace.content.strip() or (trace.reasoning_content or "").strip()]
    made = [
        (make_row(tokenizer, trace.messages, trace.reasoning_content or "", trace.content, **(weights or {})), trace)
        for trace in said
    ]
    if too_long == "shorten":
        made = [(_shortened(tokenizer, row, trace, max_length, weights), trace) for row, trace in made]
    fitting = [(row, trace) for row, trace in made if len(row.input_ids) <= max_length]
    if not fitting:
        raise ArtifactError(f"every trace is longer than {max_length} tokens", "raise --max-length")
    rows, kept = [row for row, _ in fitting], [trace for _, trace in fitting]
    return _with_logits(rows, kept, traces_path, tokenizer, loss, logit_share, work), kept


def _shortened(
    tokenizer: Tokenizer, row: Row, trace: Trace, max_length: int, weights: Mapping[str, float] | None
) -> Row:
    return shortened(tokenizer, row, trace.messages, trace.reasoning_content or "", trace.content, max_length, weights)


def _with_logits(
    rows: list[Row],
    traces: Sequence[Trace],
    traces_path: Path,
    tokenizer: Tokenizer,
    loss: Loss,
    share: float,
    work: Work,
) -> list[Row]:
    """Return the rows with the teacher's distribution where it is there; without it, only if none was asked for."""
    path = logprobs_path(traces_path)
    if loss == "cross-entropy" or (loss == "auto" and not path.exists()):
        return rows
    if not path.exists():
        raise refuse(str(why_no_logits(None, traces, tokenizer)))
    with closing(Logprobs.open(path)) as logprobs:
        reason = why_no_logits(logprobs, traces, tokenizer)
        if reason and loss == "logits":
            raise refuse(reason)
        if reason:
            work.say(f"{reason}: training on the tokens alone (cross-entropy)")
            return rows
        rows, counted = add_logits(rows, traces, logprobs, share, tokenizer)
    work.say(counted.describe())
    return rows


def hold_out(rows: Sequence[Row], traces: Sequence[Trace], n: int, seed: int) -> tuple[list[int], list[Row]]:
    """Return which rows train and up to n validation rows, of problems that none of the others asks.

    They come from the training bucket, as all rows do. Where n is more than an eighth of the problems there are none.
    """
    problems = sorted({trace.problem_id for trace in traces})
    if n < 1 or 8 * n > len(problems):
        return list(range(len(rows))), []
    held = set(random.Random(seed).sample(problems, n))
    train = [i for i, trace in enumerate(traces) if trace.problem_id not in held]
    return train, [row for row, trace in zip(rows, traces, strict=True) if trace.problem_id in held][:n]


def by_level(
    rows: Sequence[Row], traces: Sequence[Trace], rates: Mapping[str, float], batch_size: int, epochs: int, seed: int
) -> list[Row]:
    """Return the rows of every pass, by how often the student solves their problems, or is likely to."""
    tried = [(row, rates.get(trace.problem_id)) for row, trace in zip(rows, traces, strict=True)]
    return arrange(estimated(tried), batch_size, epochs, seed)
