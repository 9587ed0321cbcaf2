"""Top-k forward KL with a tail: the student's distribution should cover the teacher's, whose k best tokens are known.

The vocabulary falls into k + 1 buckets: each of the teacher's k tokens, and all the others together. KL between the
teacher's and the student's buckets is a lower bound of the full KL, exact as k grows, and it knows the tail's mass,
which truncated and renormalised top-k does not.

Source: sparse knowledge distillation, arXiv 2503.16870 (why truncation is biased); the tail as one bucket is ours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .targets import Targets

_LEAST = 1e-9  # of a bucket's probability: the logarithm of a smaller one is rounding


def forward_kl(logits: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
    """Return sum_b P_b log(P_b / Q_b) over the buckets b `[N]`, and its gradient `[N, V]` by logits `[N, V]`."""
    known, at, teacher, teacher_tail = teacher_buckets(targets)
    student = torch.log_softmax(logits, dim=-1)  # [N, V], log q
    log_q = student.gather(1, at)  # [N, k]
    top_q = torch.where(known, log_q.exp(), 0.0)  # [N, k]
    tail_q = (1 - top_q.sum(1)).clamp(min=_LEAST)  # [N]
    losses = torch.where(known, torch.xlogy(teacher, teacher) - teacher * log_q, 0.0).sum(1)
    losses = losses + torch.xlogy(teacher_tail, teacher_tail) - teacher_tail * tail_q.log()
    # d/dz_i = q_i - P_b q_i / Q_b for the bucket b of token i; a top token is a bucket of its own
    gradient = student.exp_()
    gradient.mul_((1 - teacher_tail / tail_q)[:, None])
    top_gradient = torch.where(known, top_q - teacher - top_q * (1 - teacher_tail / tail_q)[:, None], 0.0)
    return losses, gradient.scatter_add_(1, at, top_gradient)


def teacher_buckets(targets: Targets) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return which of the k tokens are known, their ids, the teacher's probabilities `[N, k]`, and its tail's `[N]`."""
    assert targets.top_ids is not None, "the rows carry no log-probabilities"
    assert targets.top_logprobs is not None
    known = targets.top_ids >= 0  # rows with fewer than k, or none, are filled up with -1
    teacher = torch.where(known, targets.top_logprobs.exp(), 0.0)
    tail = (1 - teacher.sum(1)).clamp(min=0.0)
    return known, targets.top_ids.clamp(min=0), teacher, tail
