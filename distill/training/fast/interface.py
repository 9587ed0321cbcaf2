"""Packed rows for any model whose attention goes through transformers' attention interface.

The model's own layers compute everything but attention itself, which is laid out in rows (see `packing`). For what the
fast pass does not know: dropout, DoRA, trained weights, other decoders.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface

from ..packing import Layout
from .blocks import row_attention

NAME = "deepdistill_rows"


def use_row_attention(causal_lm: Any) -> bool:
    """Let a model attend within rows when it is given a `layout`; say whether it can."""
    if not getattr(causal_lm, "_supports_attention_backend", False) or not causal_lm._supports_sdpa:
        return False
    AttentionInterface.register(NAME, _attend)
    causal_lm.config._attn_implementation = NAME
    return True


def _attend(
    module: Any, *given: Any, layout: Layout, scaling: float | None = None, dropout: float = 0.0, **_: Any
) -> tuple[Tensor, None]:
    """Return attention `[1, T, h, d]` of query `[1, h, T, d]` and keys and values `[1, h_kv, T, d]`.

    given: query, key, value and a mask, as transformers calls every attention; the rows take the mask's place.
    """
    query, key, value, _mask = given
    flat = [part[0].transpose(0, 1).flatten(1) for part in (query, key, value)]  # each [T, h * d]
    n_heads, n_kv_heads, d = query.shape[1], key.shape[1], value.shape[-1]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if dropout == 0.0 and query.shape[-1] == d:
        qkv = torch.cat(flat, dim=1)
        out = row_attention(qkv, layout, cos_sin=None, heads=(n_heads, n_kv_heads), scale=scale)
        return out.view(1, -1, n_heads, d), None
    n, length = layout.gather.shape
    heads = (n_heads, n_kv_heads, n_kv_heads)
    rows = [_gather(part, layout).view(n, length, h, -1) for part, h in zip(flat, heads, strict=True)]
    q, k, v = (part.transpose(1, 2) for part in rows)
    out = F.scaled_dot_product_attention(
        q, k, v, dropout_p=dropout, is_causal=True, scale=scale, enable_gqa=n_heads != n_kv_heads
    )  # [n, h, L, d]
    out = out.transpose(1, 2).reshape(n * length, n_heads * d).index_select(0, layout.scatter)
    return out.view(1, -1, n_heads, d), None


def _gather(flat: Tensor, layout: Layout) -> Tensor:
    rows: Tensor = _Gather.apply(flat, layout)  # type: ignore[no-untyped-call]
    return rows


class _Gather(torch.autograd.Function):
    """Flat `[T, C]` to rows `[n * L, C]`; the gradient sums up what several rows share."""

    @staticmethod
    def forward(ctx: Any, flat: Tensor, layout: Layout) -> Tensor:
        ctx.layout = layout
        return flat.index_select(0, layout.gather.flatten())

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> tuple[Tensor, None]:
        return ctx.layout.sum_back(upstream[0]), None
