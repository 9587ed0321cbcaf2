"""Cross-entropy: the teacher's token should be probable."""

from __future__ import annotations

import torch
from torch import Tensor

from .targets import Targets


def cross_entropy(logits: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
    """Return -log q(target) `[N]` and its gradient q - onehot(target) `[N, V]`, written over the logits."""
    at = targets.ids[:, None]
    normaliser = torch.logsumexp(logits, dim=-1, keepdim=True)  # [N, 1]
    losses = (normaliser - logits.gather(1, at)).squeeze(1)
    gradient = logits.sub_(normaliser).exp_()
    gradient.scatter_add_(1, at, torch.full_like(at, -1, dtype=gradient.dtype))
    return losses, gradient
