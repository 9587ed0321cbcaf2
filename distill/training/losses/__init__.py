"""The losses of a target: one a file, each a function of the logits that also returns its gradient by them.

A loss takes (logits `[N, V]` in fp32, `Targets`) and returns (loss of each target `[N]`, its gradient by that target's
logits `[N, V]`). `projected_loss` calls it chunk by chunk, so that nothing as wide as the vocabulary outlives a chunk.
"""

from __future__ import annotations

from .cross_entropy import cross_entropy
from .forward_kl import forward_kl
from .policy_gradient import policy_gradient
from .projected import Head, Loss, Segment, projected_kl, projected_loss, token_scores
from .reverse_kl import reverse_kl
from .targets import Targets, Tensors
from .unlikelihood import unlikelihood

LOSSES: dict[str, Loss] = {
    "cross_entropy": cross_entropy,
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "policy_gradient": policy_gradient,
    "unlikelihood": unlikelihood,
}
"""The losses by the names that rows give (`rows.Row.losses`)."""

__all__ = ["LOSSES", "Head", "Segment", "Targets", "Tensors", "projected_kl", "projected_loss", "token_scores"]
