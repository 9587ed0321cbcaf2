"""Log-probabilities of many given answers from a transformers model: several in one pass, padded on the right.

A causal model never looks right, so rows of any length share a batch without a mask. Rows are sorted by length, longest
first, so that little is padding and a batch that does not fit the memory fails at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ....localrun.core.generation import TopLogprobs
from .sampling import top_with

Scored = tuple[list[int], list[int]]
"""A prompt's tokens, and those of the answer that follows it."""


@torch.inference_mode()
def score_rows(
    model: Any, rows: Sequence[Scored], *, k: int, pad_id: int, max_tokens: int
) -> Iterator[tuple[int, TopLogprobs]]:
    """Yield (index, the k best tokens `[T, k]` at the place of each of the answer's T) of every row.

    A pass takes at most `max_tokens`, padding included, which bounds the memory of the logits; a longer row goes alone.
    """
    order = sorted(range(len(rows)), key=lambda i: -sum(map(len, rows[i])))
    while order:
        longest = sum(map(len, rows[order[0]]))
        n = max(1, max_tokens // longest)
        chosen, order = order[:n], order[n:]
        yield from _score_batch(model, [(i, *rows[i]) for i in chosen], k=k, pad_id=pad_id)


def _score_batch(
    model: Any, rows: Sequence[tuple[int, list[int], list[int]]], *, k: int, pad_id: int
) -> Iterator[tuple[int, TopLogprobs]]:
    """Yield (index, scores) for each (index, prompt's tokens, answer's tokens), all in one pass."""
    width = max(len(prompt) + len(answer) for _, prompt, answer in rows)
    padded = [[*prompt, *answer] + [pad_id] * (width - len(prompt) - len(answer)) for _, prompt, answer in rows]
    ids = torch.tensor(padded, device=model.device)  # [B, T]
    first = min(len(prompt) for _, prompt, _ in rows) - 1  # the prompt's last token predicts the answer's first
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=width - first).logits  # [B, T - first, V]
    for row, (i, prompt, answer) in enumerate(rows):
        start = len(prompt) - 1 - first
        given = ids[row, len(prompt) : len(prompt) + len(answer)]
        tokens, values = (part.cpu().numpy() for part in top_with(logits[row, start : start + len(answer)], k, given))
        yield i, TopLogprobs(tokens, values)
