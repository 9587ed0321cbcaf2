"""Unlikelihood: makes a token that should not follow, such as a loop's next one, less probable.

Unlike the loss of a negative advantage it is bounded below, so it can be trained on for as long as one likes.

Source: arXiv 1908.04319.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .targets import Targets

_LEAST = 1e-6  # probability of all other tokens: below it the gradient would explode


def unlikelihood(logits: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
    """Return -log(1 - q(target)) `[N]` and its gradient `[N, V]`."""
    at = targets.ids[:, None]
    gradient = torch.softmax(logits, dim=-1)  # [N, V], q
    q = gradient.gather(1, at)  # [N, 1]
    left = (1 - q).clamp(min=_LEAST)
    # d/dz_i = q_t / (1 - q_t) (onehot_i - q_i); in place, as q is no longer needed
    gradient.neg_().scatter_add_(1, at, torch.ones_like(q))
    return -left.log().squeeze(1), gradient.mul_(q / left)
