"""Choose the next token of every row: greedy, or by inverse-transform sampling with the row's own random number.

A row's number comes from its own seed, so that, but for rounding, a completion does not depend on the rows that shared
its batch, and a resumed run samples what the interrupted one would have.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ....localrun.core.generation import Sampling

_BLOCK = 256  # probabilities that are summed before one of them is searched
_NUCLEUS = 1024  # tokens tried for top-p; where they hold less than p, the whole vocabulary is sorted


def draw_uniforms(sampling: Sampling, seed: int, n: int) -> torch.Tensor | None:
    """Return the n random numbers `[n]` that a seed gives; None if greedy."""
    if sampling.temperature <= 0:
        return None
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, generator=generator, dtype=torch.float64)


def choose(
    logits: torch.Tensor, sampling: Sampling, *, uniforms: torch.Tensor | None, captured: bool = False
) -> torch.Tensor:
    """Return one token a row `[B]` from logits `[B, V]`; `uniforms` `[B]` in [0, 1) unless greedy.

    Filters apply as in llama.cpp and vLLM: top-k, then top-p, then min-p, on the tempered distribution. With `captured`
    the host reads no value, so that a CUDA graph can capture it.
    """
    if sampling.temperature <= 0 or uniforms is None:
        return logits.argmax(-1)
    probs = torch.softmax(logits.float() / sampling.temperature, dim=-1)  # [B, V]
    filtered = sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0
    if not filtered:
        return _invert(probs, uniforms)
    probs, tokens = _sorted_head(probs, sampling, captured)  # [B, K] descending
    if sampling.top_p < 1:
        total = probs.sum(-1, keepdim=True) if sampling.top_k > 0 else 1.0
        probs = probs * (probs.cumsum(-1) - probs < sampling.top_p * total)
    if sampling.min_p > 0:
        probs = probs * (probs >= sampling.min_p * probs[:, :1])
    return tokens.gather(1, _invert(probs, uniforms)[:, None])[:, 0]


def top_of(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids (int32) and log-probabilities (float32) `[B, k]` of the most probable tokens of logits `[B, V]`."""
    logits = logits.float()
    top = torch.topk(logits, min(k, logits.shape[-1]))
    return top.indices.int(), top.values - logits.logsumexp(-1, keepdim=True)


def top_with(logits: torch.Tensor, k: int, given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `top_of`, where given tokens `[B]` that are not among the k take the last place."""
    logits = logits.float()
    ids, values = top_of(logits, k)
    missing = (ids != given[:, None]).all(1)
    of_given = logits.gather(1, given[:, None])[:, 0] - logits.logsumexp(-1)
    ids[missing, -1], values[missing, -1] = given[missing].int(), of_given[missing]
    return ids, values


def _sorted_head(probs: torch.Tensor, sampling: Sampling, captured: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the most probable tokens in descending order: as many as any filter can leave."""
    n_vocab = probs.shape[-1]
    if sampling.top_k > 0:
        top = torch.topk(probs, min(sampling.top_k, n_vocab))
        return top.values, top.indices
    if captured:
        ordered = torch.sort(probs, descending=True)
        return ordered.values, ordered.indices
    top = torch.topk(probs, min(_NUCLEUS, n_vocab))
    # What lies beyond the head is dropped anyway if the head holds p, or if min-p drops the head's last token.
    enough = (top.values.sum(-1) >= sampling.top_p) | (top.values[:, -1] < sampling.min_p * top.values[:, 0])
    if bool(enough.all()):
        return top.values, top.indices
    ordered = torch.sort(probs, descending=True)
    return ordered.values, ordered.indices


def _invert(probs: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Return the index `[B]` at which the cumulative sum of `probs` `[B, K]` (any scale) passes `uniforms`.

    First the block, then the token in it: summing a vocabulary costs far less than all of its cumulative sums.
    """
    n = probs.shape[-1]
    if n <= _BLOCK:
        return _passed(probs, uniforms)[0]
    blocks = (F.pad(probs, (0, -n % _BLOCK)) if n % _BLOCK else probs).unflatten(-1, (-1, _BLOCK))  # [B, n, _BLOCK]
    block, inside = _passed(blocks.sum(-1), uniforms)
    token, _ = _passed(blocks[torch.arange(len(blocks), device=block.device), block], inside)
    return (block * _BLOCK + token).clamp(max=n - 1)


def _passed(weights: torch.Tensor, uniforms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the index `[B]` whose cumulative weight passes `uniforms`, and how far into it that is, in [0, 1)."""
    weights = weights.double()
    cumulative = weights.cumsum(-1)
    target = (uniforms * cumulative[:, -1])[:, None]
    index = torch.searchsorted(cumulative, target, right=True).clamp(max=weights.shape[-1] - 1)
    weight = weights.gather(1, index)
    inside = (target - cumulative.gather(1, index) + weight) / weight.clamp(min=torch.finfo(weight.dtype).tiny)
    return index[:, 0], inside[:, 0].clamp(0, 1 - torch.finfo(weight.dtype).eps)  # below 1, or the next would be hit
