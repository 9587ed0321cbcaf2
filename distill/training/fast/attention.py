"""Causal attention of whole rows, forward and backward.

On a CPU, PyTorch's fused attention takes many times as long backward as forward. Rows of a few hundred tokens are
faster as plain products, with the probabilities kept; queries of the heads that read the same keys go together.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

LONGEST_PLAIN = 512  # tokens; longer rows take the fused attention, whose memory does not grow with the square


def attend(rows: Tensor, n_kv_heads: int, *, scale: float, needs_gradient: bool = True) -> tuple[Tensor, Any]:
    """Return (attention `[n * L, n_heads * d]`, what `attend_back` needs).

    rows `[n, L, n_heads + 2 n_kv_heads, d]` hold the queries, then the keys, then the values.
    """
    is_plain = rows.device.type == "cpu" and rows.shape[1] <= LONGEST_PLAIN
    return (_plain if is_plain else _fused)(rows, n_kv_heads, scale=scale, needs_gradient=needs_gradient)


def attend_back(d_out: Tensor, kept: Any) -> Tensor:
    """Return the gradient of the rows `[n, L, n_heads + 2 n_kv_heads, d]` of d_out `[n * L, n_heads * d]`."""
    return (_fused_back if len(kept) == 4 else _plain_back)(d_out, *kept)


def _heads(rows: Tensor, n_kv_heads: int) -> list[int]:
    """Return how many of the rows' heads are queries, keys and values."""
    return [rows.shape[2] - 2 * n_kv_heads, n_kv_heads, n_kv_heads]


def _plain(rows: Tensor, n_kv_heads: int, *, scale: float, needs_gradient: bool) -> tuple[Tensor, Any]:
    n, length, _, d = rows.shape
    heads = _heads(rows, n_kv_heads)
    q, k, v = (_by_key(part, n_kv_heads) for part in rows.split(heads, dim=2))  # [n h_kv, L g, d], g = 1 for k and v
    mask = _mask(length, heads[0] // n_kv_heads).expand(n * n_kv_heads, -1, -1)
    # in fp32: a score rounded to bf16 would be off by hundredths, and so would its probability
    scores = torch.baddbmm(mask, q.float(), k.float().transpose(1, 2), alpha=scale)  # [n h_kv, L g, L]
    p = torch.softmax(scores, -1).to(rows.dtype)
    out = _by_row(torch.bmm(p, v), n, length)  # [n, L, n_heads * d]
    return out.reshape(n * length, heads[0] * d), (q, k, v, p, scale, n) if needs_gradient else ()


def _plain_back(d_out: Tensor, *kept: Any) -> Tensor:
    q, k, v, p, scale, n = kept
    length, d = k.shape[1:]
    n_heads, n_kv_heads = d_out.shape[1] // d, k.shape[0] // n
    d_out = _by_key(d_out.view(n, length, n_heads, d), n_kv_heads)  # [n h_kv, L g, d]
    d_v = torch.bmm(p.transpose(1, 2), d_out)  # [n h_kv, L, d], summed over the g heads that read these values
    d_p = torch.bmm(d_out, v.transpose(1, 2))  # [n h_kv, L g, L]
    # p (d_p - sum(p d_p)); where the mask was p is 0, and so is the gradient
    d_scores = torch._softmax_backward_data(d_p, p, -1, p.dtype).mul_(scale)
    d_rows = d_out.new_empty(n, length, n_heads + 2 * n_kv_heads, d)
    gradients = (torch.bmm(d_scores, k), torch.bmm(d_scores.transpose(1, 2), q), d_v)
    for part, gradient in zip(d_rows.split(_heads(d_rows, n_kv_heads), dim=2), gradients, strict=True):
        part.view(n, length, n_kv_heads, -1).copy_(_by_row(gradient, n, length).view(n, length, n_kv_heads, -1))
    return d_rows


def _by_key(heads: Tensor, n_kv_heads: int) -> Tensor:
    """Return heads `[n, L, h, d]` as `[n * h_kv, L * g, d]`: the g heads that read the same keys side by side."""
    n, length, n_heads, d = heads.shape
    grouped = heads.reshape(n, length, n_kv_heads, -1).transpose(1, 2)
    return grouped.reshape(n * n_kv_heads, length * n_heads // n_kv_heads, d)


def _by_row(heads: Tensor, n: int, length: int) -> Tensor:
    """Return heads `[n * h_kv, L * g, d]` as rows `[n, L, h_kv, g * d]`, a view."""
    return heads.view(n, heads.shape[0] // n, length, -1).transpose(1, 2)


@lru_cache(maxsize=64)
def _mask(length: int, group: int) -> Tensor:
    """Return `[L * g, L]`: minus infinity above the diagonal, each row g times."""
    return torch.full((length, length), float("-inf")).triu_(1).repeat_interleave(group, 0)


def _fused(rows: Tensor, n_kv_heads: int, *, scale: float, needs_gradient: bool) -> tuple[Tensor, Any]:
    n, length, _, d = rows.shape
    heads = _heads(rows, n_kv_heads)
    parts = (part.transpose(1, 2) for part in rows.split(heads, dim=2))  # each [n, h, L, d]
    q, k, v = (part.detach().requires_grad_(needs_gradient) for part in parts)
    with torch.enable_grad():  # a small graph of its own, which `_fused_back` runs through
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=heads[0] != n_kv_heads)
    return out.detach().transpose(1, 2).reshape(n * length, heads[0] * d), (q, k, v, out)


def _fused_back(d_out: Tensor, *kept: Any) -> Tensor:
    *leaves, out = kept
    n, n_heads, length, d = out.shape
    gradients = torch.autograd.grad(out, leaves, d_out.view(n, length, n_heads, d).transpose(1, 2))
    return torch.cat([gradient.transpose(1, 2) for gradient in gradients], dim=2)
