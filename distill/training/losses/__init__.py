"""What a target may cost: one loss a file, each a function of the logits that also gives its gradient by them.

A loss takes (logits `[N, V]` in fp32, `Targets`) and returns (loss of each target `[N]`, its gradient by that target's
logits `[N, V]`). `projected.projected_loss` calls them piece by piece, so that no piece of
the vocabulary's width outlives its chunk.
"""

from __future__ import annotations

from .cross_entropy import cross_entropy
from .forward_kl import forward_kl
from .policy_gradient import policy_gradient
from .projected import Loss, Segment, projected_kl, projected_loss, token_scores
from .reverse_kl import reverse_kl
from .targets import Targets
from .unlikelihood import unlikelihood

LOSSES: dict[str, Loss] = {
    "cross_entropy": cross_entropy,
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "policy_gradient": policy_gradient,
    "unlikelihood": unlikelihood,
}
"""The losses by the names that rows give (`rows.Row.losses`)."""

__all__ = [
    "LOSSES",
    "Loss",
    "Segment",
    "Targets",
    "cross_entropy",
    "forward_kl",
    "policy_gradient",
    "projected_kl",
    "projected_loss",
    "reverse_kl",
    "token_scores",
    "unlikelihood",
]
