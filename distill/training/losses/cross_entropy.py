"""Cross-entropy: the teacher's token should be probable."""

from __future__ import annotations

import torch
from torch import Tensor

from .targets import Targets

_LEAST = 1e-37  # of a probability in fp32: a loss is at most 85


def cross_entropy(logits: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
    """Return -log q(target) `[N]` and its gradient q - onehot(target) `[N, V]`."""
    at = targets.ids[:, None]
    gradient = torch.softmax(logits, dim=-1)
    q = gradient.gather(1, at)  # [N, 1]
    gradient.scatter_(1, at, q - 1)
    return -q.clamp(min=_LEAST).log().squeeze(1), gradient
