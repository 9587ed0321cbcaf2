"""Traces with the teacher's log-probabilities as training rows: the student learns the whole distribution, offline.

The sidecar holds the teacher's own tokens; the row holds what the student's template renders. Where both are the same
tokens, the target is the teacher's distribution; a token that the teacher did not say there (a newline that only the
template has) is taught as itself, which is what a distribution of one token comes to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher

import numpy as np
import numpy.typing as npt

from ...errors import ArtifactError
from ..records import Trace
from ..teachers.vocabulary import is_same
from ..tokenizer import Tokenizer
from ..traces.logprobs import Logprobs
from .rows import Row

_LEAST_ALIGNED = 0.5  # of a row's targets
_HINT = "train with --loss cross-entropy, or take a student with the teacher's tokenizer"


@dataclass
class LogitCounts:
    """How many rows carry the teacher's distribution, and why others do not."""

    with_logits: int = 0
    without: int = 0
    not_aligned: int = 0

    def describe(self) -> str:
        """Return one line for the user."""
        left = f"; {self.without} have none in the sidecar" if self.without else ""
        odd = f"; {self.not_aligned} are rendered as other tokens" if self.not_aligned else ""
        return f"{self.with_logits} rows carry the teacher's log-probabilities{left}{odd}"


def why_no_logits(logprobs: Logprobs | None, traces: Sequence[Trace], tokenizer: Tokenizer) -> str | None:
    """Return why these traces cannot teach by their log-probabilities; None if they can."""
    if logprobs is None:
        return "the traces have no log-probabilities beside them (--logprobs 64 keeps them)"
    having = [trace for trace in traces if trace.id in logprobs]
    if not having:
        return "no trace that trains has log-probabilities"
    for known in {trace.teacher.vocabulary for trace in having}:
        if is_same(known, tokenizer) is False:
            return "the student's tokenizer is not the teacher's, so its log-probabilities say nothing of these tokens"
    for trace in having[:20]:  # the vocabulary was not recorded, or is the same: what was said reads the same
        stored = logprobs.get(trace.id)
        if stored is not None and not _reads_as(tokenizer, stored[0], trace):
            return "the student's tokenizer reads the teacher's tokens as another text"
    return None


def add_logits(
    rows: Sequence[Row], traces: Sequence[Trace], logprobs: Logprobs, share: float, tokenizer: Tokenizer
) -> tuple[list[Row], LogitCounts]:
    """Return the rows of these traces, forward KL as `share` of the loss where the sidecar holds the distribution.

    Raises:
        ArtifactError: a record of the sidecar is broken.
    """
    counts, made = LogitCounts(), list[Row]()
    for row, trace in zip(rows, traces, strict=True):
        stored = logprobs.get(trace.id)
        if stored is None:
            counts.without += 1
            made.append(row)
            continue
        place = _places(list(row.input_ids[row.n_prompt :]), stored[0].tolist())
        counts.not_aligned += place is None
        counts.with_logits += place is not None
        if place is not None:
            row = replace(row, losses=mixture("forward_kl", share), top=logprobs.stored(trace.id, place))
        made.append(row)
    return made, counts


def mixture(name: str, share: float) -> tuple[tuple[str, float], ...]:
    """Return a loss with cross-entropy for the rest of the share."""
    parts = ((name, share), ("cross_entropy", 1 - share))
    return tuple(part for part in parts if part[1] > 0)


def refuse(reason: str) -> ArtifactError:
    """Return the error for a user who asked for logits that cannot be had."""
    return ArtifactError(f"--loss logits: {reason}", _HINT)


def _places(targets: list[int], said: list[int]) -> list[int] | None:
    """Return which of the teacher's tokens each target is, -1 for none; None if too few are."""
    n = len(targets)
    start = next((i for i in range(len(said) - n + 1) if said[i : i + n] == targets), None)
    if start is not None:
        return list(range(start, start + n))
    place = [-1] * n
    for block in SequenceMatcher(None, targets, said, autojunk=False).get_matching_blocks():
        place[block.a : block.a + block.size] = range(block.b, block.b + block.size)
    return place if sum(at >= 0 for at in place) >= _LEAST_ALIGNED * n else None


def _reads_as(tokenizer: Tokenizer, ids: npt.NDArray[np.int32], trace: Trace) -> bool:
    if len(tokenizer) <= int(ids.max(initial=0)):
        return False
    text = tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return trace.content.strip() in text and (trace.reasoning_content or "").strip() in text
