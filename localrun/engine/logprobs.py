"""The logits of a text, and the k most probable tokens of a row of them, fast enough to compute at every token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ...errors import ModelError
from ..core.generation import TopLogprobs
from .llama import Context, Entry

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    TopRow = tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]

_BLOCK = 64


def logit_rows(context: Context, tokens: Sequence[int], start: int = 0) -> Iterator[npt.NDArray[np.float32]]:
    """Yield the logits `[V]` that follow each token of a text from `start` on: views that are overwritten.

    The text takes the place of what sequence 0 holds.

    Raises:
        ModelError: code "prompt-too-long".
    """
    if not start < len(tokens) <= context.n_ctx:
        raise ModelError(
            f"{len(tokens)} tokens do not fit the context of {context.n_ctx}",
            "give a larger --context",
            code="prompt-too-long",
        )
    context.forget(0)
    for begin in range(0, len(tokens), context.n_batch):
        part = range(begin, min(begin + context.n_batch, len(tokens)))
        context.decode([Entry(tokens[i], i, 0, i >= start) for i in part])
        yield from (context.logits(i - begin) for i in part if i >= start)


def top_of(logits: npt.NDArray[np.float32], k: int) -> TopRow:
    """Return the ids `[k]` and log-probabilities `[k]` of the k highest logits `[V]`, the highest first.

    The k-th highest of the maxima of blocks bounds the k-th highest logit from below, so that only a few candidates are
    sorted: a tenth of what partitioning the whole row takes.
    """
    import numpy as np

    k = min(k, len(logits))
    n_blocks = len(logits) // _BLOCK
    if n_blocks >= k:
        maxima = logits[: n_blocks * _BLOCK].reshape(n_blocks, _BLOCK).max(axis=1)
        candidates = np.flatnonzero(logits >= np.partition(maxima, n_blocks - k)[n_blocks - k])
    else:
        candidates = np.arange(len(logits))
    ids = candidates[np.argsort(-logits[candidates], kind="stable")[:k]]
    highest = logits[ids[0]]
    total = highest + np.log(np.exp(logits - highest).sum(dtype=np.float64))
    return ids.astype(np.int32), (logits[ids] - total).astype(np.float32)


def top_with(logits: npt.NDArray[np.float32], k: int, given: int) -> TopRow:
    """Return `top_of`, but with the given token in the last place if it is not among the k."""
    import numpy as np

    ids, values = top_of(logits, k)
    if given not in ids:
        highest = logits.max()
        total = highest + np.log(np.exp(logits - highest).sum(dtype=np.float64))
        ids[-1], values[-1] = given, logits[given] - total
    return ids, values


def stack_rows(rows: Sequence[TopRow], k: int) -> TopLogprobs:
    """Return the rows of T tokens as one record, `[T, k]`."""
    import numpy as np

    if not rows:
        return TopLogprobs(np.empty((0, k), np.int32), np.empty((0, k), np.float32))
    return TopLogprobs(np.stack([ids for ids, _ in rows]), np.stack([values for _, values in rows]))
