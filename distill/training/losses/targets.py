"""The N targets of a batch: the token that should follow, and whatever else the losses of its row need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tensors:
    """A dataclass of tensors, some of which may be None, that move together."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """Return the same on another device."""
        return self.each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """Return the same in page-locked memory, from which a GPU copies while it computes."""
        return self.each(Tensor.pin_memory)

    def each(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Return the same with every tensor changed."""
        known = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: change(value) for name, value in known.items() if value is not None})


@dataclass(frozen=True)
class Targets(Tensors):
    """Flat tensors of the N targets of a batch; None for what no row of the batch has.

    `top_ids` is -1 where the teacher gave fewer than k. Where a row lacks what others have, advantages are 0 and old
    log-probabilities NaN.
    """

    ids: Tensor  # [N], the token that follows
    weights: Tensor  # [N], fp32, how much a target counts; also in the mean's denominator
    top_ids: Tensor | None = None  # [N, k]
    top_logprobs: Tensor | None = None  # [N, k], fp32
    advantages: Tensor | None = None  # [N], fp32, any sign
    old_logprobs: Tensor | None = None  # [N], fp32, of the target when it was sampled

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, part: slice) -> Targets:
        return self.each(lambda tensor: tensor[part])
