"""Rows as one batch: packed end to end without padding, and common beginnings computed once.

The flat tokens of all rows go through the linear layers. Only attention sees rows: `gather` lays each row's tokens out
`[n, L]`, padded on the right, where a causal model never looks, and `scatter` brings the results back. So rows do not
see each other, as in a padded batch, without a mask.

Rows that begin alike share the beginning: equal tokens after equal beginnings have equal states, so these are computed
once and gathered for each row, and their gradients add up. Loss and gradient are those of separate rows, for less work.

Sizes come in few steps: a few meaningless tokens are put behind the shortest row, where nothing looks at them. oneDNN
compiles a matrix product for each new shape, which takes ten times as long as the product itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .losses import Segment, Targets, Tensors
from .rows import Row


@dataclass(frozen=True)
class Layout(Tensors):
    """Where T packed tokens are in n rows of at most L."""

    gather: Tensor  # [n, L], the flat index of each row's tokens; 0 in the padding
    scatter: Tensor  # [T], where in [n * L] each flat token is, in the first row that has it
    shared: Tensor  # [U], the flat tokens that are in several rows
    copies: Tensor  # [M], where in [n * L] the later of these rows have them
    copy_of: Tensor  # [M], which of the U each copy is

    def sum_back(self, rows: Tensor) -> Tensor:
        """Return for each flat token the sum over its places in the rows: `[T, C]` of `[n * L, C]`.

        This is the gradient of gathering.
        """
        flat = rows.index_select(0, self.scatter)
        if len(self.shared):
            # in fp32: a prompt's gradient is the sum of as many terms as rows begin with it
            sums = flat.index_select(0, self.shared).float()
            sums.index_add_(0, self.copy_of, rows.index_select(0, self.copies).float())
            flat.index_copy_(0, self.shared, sums.to(flat.dtype))
        return flat


@dataclass(frozen=True)
class Batch:
    """What one pass computes. `n_tokens` counts the rows' tokens, a shared beginning in each of its rows."""

    input_ids: Tensor  # [1, T] packed, or [n, L] padded
    position_ids: Tensor  # the same shape
    layout: Layout | None  # None: padded
    positions: Tensor  # [N], which of the flattened states predicts each target
    targets: Targets
    segments: tuple[Segment, ...]
    n_tokens: int
    weight: float  # the sum of the targets' weights, the mean's denominator

    def inputs(self) -> dict[str, Any]:
        """Return the arguments of the model's forward."""
        return dict(self.__dict__)


def pack(rows: Sequence[Row]) -> Batch:
    """Return the rows packed end to end, common beginnings once."""
    # by losses, which makes few segments; then by tokens, which makes neighbours of rows that begin alike
    ordered = sorted(rows, key=lambda row: (row.losses, list(row.input_ids)))
    n_shared = [0, *(_n_shared(a.input_ids, b.input_ids) for a, b in pairwise(ordered))]
    lengths = [len(row.input_ids) for row in ordered]
    n_flat = sum(lengths) - sum(n_shared)
    # the filling goes behind the shortest row, where it widens the rows least; no token of a row looks that way
    shortest, n_fill = lengths.index(min(lengths)), rounded_up(n_flat) - n_flat
    end = lengths[shortest]
    width = rounded_up(max(end + n_fill, *lengths))  # L
    gather = np.zeros((len(ordered), width), np.int64)
    flat, positions, scatter, copies = list[int](), list[int](), list[int](), list[int]()
    for i, (row, shared) in enumerate(zip(ordered, n_shared, strict=True)):
        start, length, first = len(flat), lengths[i], i * width
        gather[i, :shared] = gather[i - 1, :shared]  # the very tokens of the row before
        gather[i, shared:length] = np.arange(start, start + length - shared)
        flat += row.input_ids[shared:]
        positions += range(shared, length)
        copies += range(first, first + shared)
        scatter += range(first + shared, first + length)
    gather[shortest, end : end + n_fill] = np.arange(n_flat, n_flat + n_fill)
    scatter += range(shortest * width + end, shortest * width + end + n_fill)
    flat, positions = [*flat, *[0] * n_fill], [*positions, *[0] * n_fill]
    several, copy_of = np.unique(gather.ravel()[copies], return_inverse=True)
    places = (gather, np.array(scatter), several, np.array(copies, np.int64), copy_of)
    return _batch(
        ordered,
        torch.tensor([flat]),
        position_ids=torch.tensor([positions]),
        layout=Layout(*(torch.from_numpy(place) for place in places)),
        # the state at a token predicts the next one
        predicted_from=[gather[i, row.n_prompt - 1 : lengths[i] - 1] for i, row in enumerate(ordered)],
    )


def pad(rows: Sequence[Row], pad_token_id: int) -> Batch:
    """Return the rows padded on the right `[n, L]`, for models whose attention is not ours.

    No attention mask: a causal model never looks right, so real tokens cannot see the padding.
    """
    ordered = sorted(rows, key=lambda row: row.losses)
    width = max(len(row.input_ids) for row in ordered)
    input_ids = torch.full((len(ordered), width), pad_token_id)
    for i, row in enumerate(ordered):
        input_ids[i, : len(row.input_ids)] = torch.tensor(row.input_ids)
    predicted_from = [
        np.arange(i * width + row.n_prompt - 1, i * width + len(row.input_ids) - 1) for i, row in enumerate(ordered)
    ]
    position_ids = torch.arange(width).expand(len(ordered), width)
    return _batch(ordered, input_ids, position_ids=position_ids, layout=None, predicted_from=predicted_from)


def _batch(
    rows: Sequence[Row],
    input_ids: Tensor,
    *,
    position_ids: Tensor,
    layout: Layout | None,
    predicted_from: Sequence[np.ndarray[Any, Any]],
) -> Batch:
    targets = _targets(rows)
    return Batch(
        input_ids=input_ids,
        position_ids=position_ids,
        layout=layout,
        positions=torch.from_numpy(np.concatenate(predicted_from)),
        targets=targets,
        segments=_segments(rows),
        n_tokens=sum(len(row.input_ids) for row in rows),
        weight=float(targets.weights.sum()),
    )


def rounded_up(n: int) -> int:
    """Return the next size that shapes come in: a multiple of 16, of 32 from 512 on, and so on, n / 16 at most."""
    step = max(16, 1 << max(0, n.bit_length() - 5))
    return -(-n // step) * step


def _n_shared(a: Sequence[int], b: Sequence[int]) -> int:
    """Return with how many equal tokens both begin."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _segments(rows: Sequence[Row]) -> tuple[Segment, ...]:
    """Return the runs of targets that carry the same losses."""
    found: list[Segment] = []
    start = 0
    for row in rows:
        end = start + row.n_targets
        if found and found[-1].losses == row.losses:
            found[-1] = replace(found[-1], end=end)
        else:
            found.append(Segment(start, end, row.losses))
        start = end
    return tuple(found)


def _targets(rows: Sequence[Row]) -> Targets:
    def flat(name: str, missing: float) -> Tensor | None:  # [N]
        if all(getattr(row, name) is None for row in rows):
            return None
        each = [getattr(row, name) or [missing] * row.n_targets for row in rows]
        return torch.tensor([value for values in each for value in values], dtype=torch.float32)

    weights = flat("weights", 1.0)
    ids = torch.tensor([token for row in rows for token in row.input_ids[row.n_prompt :]], dtype=torch.long)
    top_ids, top_logprobs = _top(rows)
    return Targets(
        ids=ids,
        weights=weights if weights is not None else torch.ones(len(ids)),
        top_ids=top_ids,
        top_logprobs=top_logprobs,
        advantages=flat("advantages", 0.0),
        old_logprobs=flat("old_logprobs", float("nan")),
    )


def _top(rows: Sequence[Row]) -> tuple[Tensor | None, Tensor | None]:
    """Return the teacher's tokens and log-probabilities `[N, k]`, -1 and -inf where there are none."""
    tops = [row.distribution() for row in rows]
    k = max((top.ids.shape[1] for top in tops if top is not None), default=0)
    if not k:
        return None, None
    n = sum(row.n_targets for row in rows)
    ids, logprobs = np.full((n, k), -1, np.int64), np.full((n, k), -np.inf, np.float32)
    start = 0
    for row, top in zip(rows, tops, strict=True):
        if top is not None:
            here = np.s_[start : start + row.n_targets, : top.ids.shape[1]]
            ids[here], logprobs[here] = top.ids, top.values
        start += row.n_targets
    return torch.from_numpy(ids), torch.from_numpy(logprobs)
