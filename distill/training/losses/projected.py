"""The losses behind the vocabulary projection, chunk by chunk: peak memory does not grow with the number of targets.

Each chunk of targets is projected, its loss and the loss's gradient are taken, and the gradient goes straight back
through the projection. So the logits live for one chunk and the projection is computed once, not again in the backward
pass, which only scales what is ready.

Source: the idea is Liger Kernel's fused linear cross-entropy (arXiv 2410.10989); ours is plain PyTorch, for any loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .forward_kl import forward_kl
from .targets import Targets

Loss = Callable[[Tensor, Targets], tuple[Tensor, Tensor]]
# Of fp32 logits at once. On a CPU freed memory of up to 32 MB is used again, more is mapped anew; a GPU wants fewer,
# larger products.
CHUNK_BYTES = {"cpu": 24 << 20, "cuda": 256 << 20}
_STEP = 16  # targets of a chunk are a multiple


@dataclass(frozen=True)
class Segment:
    """A run of targets that carry the same losses, each with its share: `((name, share), …)`."""

    start: int
    end: int
    losses: tuple[tuple[str, float], ...]


def projected_loss(
    hidden: Tensor,
    projection: Tensor,
    targets: Targets,
    segments: Sequence[Segment],
    losses: Mapping[str, Loss],
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    chunk_bytes: int | None = None,
) -> Tensor:
    """Return the weighted sum of the losses of N targets, a scalar in fp32; 0 with a gradient of 0 if there are none.

    hidden `[N, H]` are the states that predict the targets, projection is `[V, H]`, bias `[V]`. The logits are
    `scale * (hidden @ projection.T + bias)`, then capped as Gemma 2 does where `softcap` is given.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    shape = _Head(softcap, scale, _chunk_rows(projection, chunk_bytes))
    total: Tensor = _ProjectedLoss.apply(  # type: ignore[no-untyped-call]
        hidden, projection, bias, targets, segments, losses, shape
    )
    return total


def projected_kl(hidden: Tensor, projection: Tensor, top_ids: Tensor, top_logprobs: Tensor) -> Tensor:
    """Return the mean forward KL from a teacher's best tokens and log-probabilities `[N, k]`: see `forward_kl`.

    hidden `[N, H]`, projection `[V, H]`.
    """
    n = len(hidden)
    targets = Targets(top_ids[:, 0], top_logprobs.new_ones(n), top_ids, top_logprobs)
    segments = [Segment(0, n, (("forward_kl", 1.0),))]
    return projected_loss(hidden, projection, targets, segments, {"forward_kl": forward_kl}) / n


class _Head(NamedTuple):
    softcap: float | None
    scale: float
    rows: int  # of a chunk

    def logits(self, hidden: Tensor, projection: Tensor, bias: Tensor | None) -> Tensor:
        """Return the logits `[n, V]` in fp32."""
        z = F.linear(hidden, projection, bias).float()
        z = z.mul_(self.scale) if self.scale != 1.0 else z
        return z.div_(self.softcap).tanh_().mul_(self.softcap) if self.softcap else z

    def slope(self, logits: Tensor) -> Tensor | None:
        """Return d logits / d (the product) `[n, V]` where it is not the scale alone."""
        return 1 - (logits / self.softcap) ** 2 if self.softcap else None


class _ProjectedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        projection: Tensor,
        bias: Tensor | None,
        targets: Targets,
        segments: Sequence[Segment],
        losses: Mapping[str, Loss],
        head: _Head,
    ) -> Tensor:
        weight = projection.to(hidden.dtype)  # a copy only under autocast
        total = hidden.new_zeros((), dtype=torch.float32)
        by_hidden = torch.zeros_like(hidden)
        by_projection = torch.zeros_like(projection) if projection.requires_grad else None
        by_bias = torch.zeros_like(bias) if bias is not None and bias.requires_grad else None
        with torch.autocast(hidden.device.type, enabled=False):
            for segment in _chunks(segments, head.rows):
                start, end = segment.start, segment.end
                part = hidden[start:end]  # [n, H]
                logits = head.logits(_filled(part), weight, None if bias is None else bias.to(hidden.dtype))
                logits = logits[: len(part)]
                slope = head.slope(logits)
                loss, gradient = _mixture(logits, targets[start:end], segment.losses, losses)
                total += loss
                gradient = gradient if slope is None else gradient.mul_(slope)
                gradient = gradient.mul_(head.scale) if head.scale != 1.0 else gradient
                gradient = gradient.to(hidden.dtype)  # [n, V]
                each = targets.weights[start:end, None].to(hidden.dtype)
                gradient = _filled(gradient)
                by_part = (gradient @ weight)[: len(part)]
                torch.mul(by_part, each, out=by_hidden[start:end])  # weighted here, where it is narrow
                if by_projection is not None:
                    by_projection += (gradient.T @ _filled(part * each)).to(by_projection.dtype)
                if by_bias is not None:
                    by_bias += (gradient[: len(part)].T @ each).squeeze(1).to(by_bias.dtype)
        ctx.gradients = (by_hidden, by_projection, by_bias)
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> tuple[Tensor | None, ...]:
        factor = upstream[0]
        scaled = (None if gradient is None else gradient.mul_(factor) for gradient in ctx.gradients)
        gradients = (*scaled, None, None, None, None)
        ctx.gradients = None
        return gradients


def _chunk_rows(projection: Tensor, chunk_bytes: int | None = None) -> int:
    """Return how many targets a chunk holds."""
    chunk_bytes = chunk_bytes or CHUNK_BYTES.get(projection.device.type, CHUNK_BYTES["cpu"])
    return max(1, chunk_bytes // (4 * projection.shape[0] * _STEP)) * _STEP


def _filled(rows: Tensor) -> Tensor:
    """Return rows with rows of zeros behind them, so that products come in few shapes (see packing)."""
    n_missing = -len(rows) % _STEP
    return F.pad(rows, (0, 0, 0, n_missing)) if n_missing else rows


def _mixture(
    logits: Tensor, targets: Targets, terms: tuple[tuple[str, float], ...], losses: Mapping[str, Loss]
) -> tuple[Tensor, Tensor]:
    """Return the weighted sum of the mixed losses, and each target's gradient by its logits `[n, V]`, unweighted."""
    total, whole = logits.new_zeros(()), None
    for name, share in terms:
        each, gradient = losses[name](logits, targets)
        total = total + share * (each * targets.weights).sum()
        gradient = gradient if share == 1.0 else gradient.mul_(share)
        whole = gradient if whole is None else whole.add_(gradient)
    assert whole is not None, "a segment names no loss"
    return total, whole


def _chunks(segments: Sequence[Segment], rows: int) -> Sequence[Segment]:
    return [
        Segment(start, min(start + rows, segment.end), segment.losses)
        for segment in segments
        for start in range(segment.start, segment.end, rows)
    ]


@torch.no_grad()
def token_scores(
    hidden: Tensor,
    projection: Tensor,
    ids: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Return log q of each token in ids `[N]` and whether it is the most probable one `[N]`, without a gradient.

    hidden `[N, H]`, projection `[V, H]`; `bias`, `softcap` and `scale` as in `projected_loss`. What the
    validation shows, and what an advantage is made of.
    """
    logprobs = hidden.new_zeros(len(ids), dtype=torch.float32)
    is_best = torch.zeros(len(ids), dtype=torch.bool, device=hidden.device)
    rows = _chunk_rows(projection)
    head = _Head(softcap, scale, rows)
    for start in range(0, len(ids), rows):
        part = slice(start, start + rows)
        logits = head.logits(_filled(hidden[part]), projection.to(hidden.dtype), bias)[: len(ids[part])]
        chosen = logits.gather(1, ids[part, None]).squeeze(1)
        logprobs[part] = chosen - torch.logsumexp(logits, dim=-1)
        is_best[part] = logits.argmax(-1) == ids[part]
    return logprobs, is_best
