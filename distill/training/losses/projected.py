"""The losses behind the vocabulary projection, chunk by chunk: peak memory does not grow with the number of targets.

Each chunk of targets is projected to logits, its losses and their gradients are computed, and the gradients go straight
back through the projection. So logits exist for one chunk at a time, and the projection is computed once: the backward
pass only scales the gradients.

Source: the idea is Liger Kernel's fused linear cross-entropy (arXiv 2410.10989); ours is plain PyTorch, for any loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .forward_kl import forward_kl
from .targets import Targets

Loss = Callable[[Tensor, Targets], tuple[Tensor, Tensor]]
# Of fp32 logits at once. A CPU's allocator reuses freed blocks of up to 32 MB and maps larger ones anew; a GPU wants
# fewer, larger products.
CHUNK_BYTES = {"cpu": 24 << 20, "cuda": 256 << 20}
_STEP = 16  # a chunk has a multiple of so many targets


@dataclass(frozen=True)
class Segment:
    """A run of targets that carry the same losses, each with its share: `((name, share), …)`."""

    start: int
    end: int
    losses: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Head:
    """How a model makes its logits of its last states: `scale * (states @ weight.T + bias)`, then capped.

    weight `[V, H]`, bias `[V]`; softcap as in Gemma 2: `softcap * tanh(logits / softcap)`.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0

    def logits(self, states: Tensor) -> Tensor:
        """Return the logits `[n, V]`, in fp32, of states `[n, H]` in the weight's format."""
        z = F.linear(states, self.weight, self.bias).float()
        z = z.mul_(self.scale) if self.scale != 1.0 else z
        return z.div_(self.softcap).tanh_().mul_(self.softcap) if self.softcap else z

    def to(self, dtype: torch.dtype) -> Head:
        """Return the same head in another number format."""
        return replace(self, weight=self.weight.to(dtype), bias=None if self.bias is None else self.bias.to(dtype))


def projected_loss(
    hidden: Tensor,
    head: Head,
    *,
    targets: Targets,
    segments: Sequence[Segment],
    losses: Mapping[str, Loss],
    chunk_bytes: int | None = None,
) -> Tensor:
    """Return the weighted sum of the losses of N targets, a scalar in fp32; 0 with a gradient of 0 if there are none.

    hidden `[N, H]` are the states that predict the targets. chunk_bytes: of the logits that exist at once.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    n_rows = _chunk_rows(head.weight, chunk_bytes)
    total: Tensor = _ProjectedLoss.apply(  # type: ignore[no-untyped-call]
        hidden, head.weight, head.bias, head, targets, _chunks(segments, n_rows), losses
    )
    return total


def projected_kl(hidden: Tensor, projection: Tensor, *teacher: Tensor) -> Tensor:
    """Return the mean forward KL from a teacher's distribution to the student's: see `forward_kl`.

    hidden `[N, H]`, projection `[V, H]`; teacher: the ids of its best tokens, and their log-probabilities, `[N, k]`.
    """
    top_ids, top_logprobs = teacher
    n = len(hidden)
    targets = Targets(top_ids[:, 0], top_logprobs.new_ones(n), top_ids, top_logprobs)
    segments = [Segment(0, n, (("forward_kl", 1.0),))]
    losses = {"forward_kl": forward_kl}
    return projected_loss(hidden, Head(projection), targets=targets, segments=segments, losses=losses) / n


class _ProjectedLoss(torch.autograd.Function):
    """The loss's gradients are computed in the forward pass, chunk by chunk; the backward pass scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # [N, H]
        projection: Tensor,  # [V, H], the head's weight: autograd sees only arguments
        bias: Tensor | None,  # [V]
        head: Head,
        targets: Targets,
        chunks: Sequence[Segment],
        losses: Mapping[str, Loss],
    ) -> Tensor:
        head = head.to(hidden.dtype)  # a copy only under autocast
        total = hidden.new_zeros((), dtype=torch.float32)
        d_hidden = torch.zeros_like(hidden)
        d_projection = torch.zeros_like(projection) if projection.requires_grad else None
        d_bias = torch.zeros_like(bias) if bias is not None and bias.requires_grad else None
        with torch.autocast(hidden.device.type, enabled=False):
            for chunk in chunks:
                part = slice(chunk.start, chunk.end)
                n, weights = chunk.end - chunk.start, targets.weights[part, None].to(hidden.dtype)  # [n, 1]
                loss, d_product = _chunk_loss(
                    head, hidden[part], targets=targets[part], terms=chunk.losses, losses=losses
                )
                total += loss
                # weighted here, where it is [n, H], not in the gradient of the logits, which is [n, V]
                torch.mul((d_product @ head.weight)[:n], weights, out=d_hidden[part])
                if d_projection is not None:
                    d_projection += (d_product.T @ _filled(hidden[part] * weights)).to(d_projection.dtype)
                if d_bias is not None:
                    d_bias += (d_product[:n].T @ weights).squeeze(1).to(d_bias.dtype)
        ctx.gradients = (d_hidden, d_projection, d_bias)
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> tuple[Tensor | None, ...]:
        scaled = (None if gradient is None else gradient.mul_(upstream[0]) for gradient in ctx.gradients)
        gradients = (*scaled, None, None, None, None)
        ctx.gradients = None
        return gradients


def _chunk_rows(projection: Tensor, chunk_bytes: int | None = None) -> int:
    """Return how many targets a chunk holds, at most."""
    chunk_bytes = chunk_bytes or CHUNK_BYTES.get(projection.device.type, CHUNK_BYTES["cpu"])
    return max(1, chunk_bytes // (4 * projection.shape[0] * _STEP)) * _STEP


def _filled(rows: Tensor) -> Tensor:
    """Return rows `[n, C]` with zeros appended to a multiple of 16, so that products have few shapes (see packing)."""
    n_missing = -len(rows) % _STEP
    return F.pad(rows, (0, 0, 0, n_missing)) if n_missing else rows


def _chunk_loss(
    head: Head, hidden: Tensor, *, targets: Targets, terms: tuple[tuple[str, float], ...], losses: Mapping[str, Loss]
) -> tuple[Tensor, Tensor]:
    """Return the weighted sum of a chunk's n losses, and each one's gradient, unweighted.

    The gradient is by the product of states and projection, in the states' format, filled up: `[n + fill, V]`.
    """
    logits = head.logits(_filled(hidden))[: len(hidden)]
    # d/dz of c tanh(z / c) is 1 - tanh^2; taken of the logits before a loss may write over them
    slope = 1 - (logits / head.softcap) ** 2 if head.softcap else None
    total, gradient = logits.new_zeros(()), None
    for name, share in terms:
        each, d_logits = losses[name](logits, targets)
        total = total + share * (each * targets.weights).sum()
        d_logits = d_logits if share == 1.0 else d_logits.mul_(share)
        gradient = d_logits if gradient is None else gradient.add_(d_logits)
    assert gradient is not None, "a segment names no loss"
    gradient = gradient if slope is None else gradient.mul_(slope)
    gradient = gradient if head.scale == 1.0 else gradient.mul_(head.scale)
    return total, _filled(gradient.to(hidden.dtype))


def _chunks(segments: Sequence[Segment], rows: int) -> list[Segment]:
    """Return the segments cut into chunks of at most so many rows."""
    return [
        Segment(start, min(start + rows, segment.end), segment.losses)
        for segment in segments
        for start in range(segment.start, segment.end, rows)
    ]


@torch.no_grad()
def token_scores(hidden: Tensor, head: Head, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return log q of each token in ids `[N]` and whether it is the most probable one `[N]`, without a gradient.

    hidden `[N, H]` are the states that predict them. Validation shows both, and advantages are made of the first.
    """
    logprobs = hidden.new_zeros(len(ids), dtype=torch.float32)
    is_best = torch.zeros(len(ids), dtype=torch.bool, device=hidden.device)
    head, n_rows = head.to(hidden.dtype), _chunk_rows(head.weight)
    for start in range(0, len(ids), n_rows):
        part = slice(start, start + n_rows)
        logits = head.logits(_filled(hidden[part]))[: len(ids[part])]  # [n, V]
        chosen = logits.gather(1, ids[part, None]).squeeze(1)
        logprobs[part] = chosen - torch.logsumexp(logits, dim=-1)
        is_best[part] = logits.argmax(-1) == ids[part]
    return logprobs, is_best
