"""Top-k reverse KL with a tail, for the student's own samples: it should do only what the teacher might do.

Reverse KL over truncated top-k is unstable, since probability outside the top k is not penalized. Here the tail is a
bucket, and the teacher's probability of each bucket has a floor, so that the penalty for leaving it is bounded.

Source: on-policy distillation, MiniLLM arXiv 2306.08543 and GKD arXiv 2306.13649; the buckets are `forward_kl`'s.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .forward_kl import teacher_buckets
from .targets import Targets

_FLOOR = 1e-4  # of the teacher's probability of a bucket


def reverse_kl(logits: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
    """Return sum_b Q_b log(Q_b / P_b) over the buckets b `[N]`, and its gradient `[N, V]` by logits `[N, V]`."""
    known, at, teacher, teacher_tail = teacher_buckets(targets)
    student = torch.log_softmax(logits, dim=-1)  # [N, V], log q
    log_q = student.gather(1, at)  # [N, k]
    top_q = torch.where(known, log_q.exp(), 0.0)
    tail_q = (1 - top_q.sum(1)).clamp(min=1e-9)  # [N]; rounding may leave it at 0 or below
    ratio = torch.where(known, log_q - teacher.clamp(min=_FLOOR).log(), 0.0)  # [N, k], log Q_b / P_b
    tail_ratio = tail_q.log() - teacher_tail.clamp(min=_FLOOR).log()  # [N]
    losses = (top_q * ratio).sum(1) + tail_q * tail_ratio
    # d/dz_i = q_i (log Q_b / P_b - loss) for the bucket b of token i: first as if all were in the tail, then the top k
    gradient = student.exp_()
    gradient.mul_((tail_ratio - losses)[:, None])
    return losses, gradient.scatter_add_(1, at, top_q * torch.where(known, ratio - tail_ratio[:, None], 0.0))
