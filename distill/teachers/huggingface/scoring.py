"""Log-probabilities of many given answers from a transformers model: several in one pass, padded on the right.

A causal model never looks right, so rows of any length stand in one batch without a mask. Answers are sorted by length,
the longest first, so that little is padding and what does not fit the memory fails at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ....localrun.core.generation import TopLogprobs
from .sampling import top_with

_TOKENS = {"cuda": 16384, "cpu": 2048}  # of a pass, padding included: bounds the logits' memory

Scored = tuple[list[int], list[int]]
"""A prompt's tokens, and those of the answer that follows it."""


@torch.inference_mode()
def score_rows(model: Any, rows: Sequence[Scored], k: int, pad_id: int) -> Iterator[tuple[int, TopLogprobs]]:
    """Yield (index, the k best tokens `[T, k]` at the place of each of the answer's T) of every row."""
    most = _TOKENS.get(model.device.type, _TOKENS["cpu"])
    order = sorted(range(len(rows)), key=lambda i: -sum(map(len, rows[i])))
    while order:
        longest = sum(map(len, rows[order[0]]))
        n = max(1, most // longest)
        chosen, order = order[:n], order[n:]
        yield from _score_batch(model, rows, chosen, k, pad_id)


def _score_batch(
    model: Any, rows: Sequence[Scored], chosen: Sequence[int], k: int, pad_id: int
) -> Iterator[tuple[int, TopLogprobs]]:
    texts = [[*rows[i][0], *rows[i][1]] for i in chosen]
    width = max(map(len, texts))
    ids = torch.tensor([text + [pad_id] * (width - len(text)) for text in texts], device=model.device)  # [B, T]
    first = min(len(rows[i][0]) for i in chosen) - 1  # the prompt's last token begins the answer
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=width - first).logits  # [B, T - first, V]
    for row, i in enumerate(chosen):
        start, n = len(rows[i][0]) - 1 - first, len(rows[i][1])
        given = ids[row, len(rows[i][0]) : len(rows[i][0]) + n]
        tokens, values = (part.cpu().numpy() for part in top_with(logits[row, start : start + n], k, given))
        yield i, TopLogprobs(tokens, values)
