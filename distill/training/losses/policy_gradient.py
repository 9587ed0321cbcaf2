"""Policy gradient: a token that the student sampled becomes more or less probable, as its advantage says.

With `old_logprobs`, those of the sampling, the importance ratio is clipped as PPO does (arXiv 1707.06347); without them
the sample counts as fresh (a ratio of 1). The advantage may be a grader's, or the teacher's log-probability minus the
student's: reverse KL from one sample a token, as in on-policy distillation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .targets import Targets

CLIP = 0.2


def policy_gradient(logits: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
    """Return -A log q(target), or with old log-probabilities -min(r A, clip(r) A), `[N]`; and the gradient `[N, V]`."""
    assert targets.advantages is not None, "the rows carry no advantages"
    advantages, at = targets.advantages, targets.ids[:, None]
    gradient = torch.log_softmax(logits, dim=-1)  # [N, V], log q
    log_q = gradient.gather(1, at).squeeze(1)  # [N]
    if targets.old_logprobs is None:
        losses, scale = -advantages * log_q, advantages
    else:
        # where a row has no old log-probabilities (NaN) the ratio is 1
        old = torch.where(targets.old_logprobs.isnan(), log_q, targets.old_logprobs)
        ratio = (log_q - old).exp()
        clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
        losses = -torch.minimum(ratio * advantages, clipped * advantages)
        is_free = ratio * advantages <= clipped * advantages  # elsewhere the clip is active: no gradient
        scale = torch.where(is_free, ratio * advantages, 0.0)
    # d(-A log q_t)/dz_i = A (q_i - onehot_i); through the ratio r, dr = r d(log q), so A becomes r A
    gradient.exp_().scatter_add_(1, at, torch.full_like(at, -1, dtype=gradient.dtype))
    return losses, gradient.mul_(scale[:, None])
