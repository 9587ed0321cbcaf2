"""Cross-entropy: makes the given token, the teacher's, more probable."""

from __future__ import annotations

import torch
from torch import Tensor

from .targets import Targets

_LEAST = 1e-37  # fp32's smallest probability, about: no loss is above 85


def cross_entropy(logits: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
    """Return -log q(target) `[N]` and its gradient q - onehot(target) `[N, V]`."""
    at = targets.ids[:, None]
    gradient = torch.softmax(logits, dim=-1)  # [N, V], q
    q = gradient.gather(1, at)  # [N, 1]
    gradient.scatter_(1, at, q - 1)  # in place: the softmax is the gradient everywhere else
    return -q.clamp(min=_LEAST).log().squeeze(1), gradient
