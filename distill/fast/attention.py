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

NAME = "deepdistill_rows"


def use_row_attention(causal_lm: Any) -> bool:
    """Let a model attend within rows when it is given a `layout`; say whether it can."""
    if not getattr(causal_lm, "_supports_attention_backend", False) or not causal_lm._supports_sdpa:
        return False
    AttentionInterface.register(NAME, _attend)
    causal_lm.config._attn_implementation = NAME
    return True


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    layout: Layout,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Return attention `[1, T, h, d]` of query `[1, h, T, d]` and keys and values `[1, h_kv, T, d]`."""
    n, length = layout.gather.shape
    n_heads, d = query.shape[1], value.shape[-1]
    q, k, v = (_Gather.apply(part[0].transpose(0, 1).flatten(1), layout) for part in (query, key, value))  # type: ignore[no-untyped-call]
    q, k, v = (
        part.view(n, length, -1, size).transpose(1, 2)
        for part, size in zip((q, k, v), _sizes(query, key, value), strict=True)
    )
    is_grouped = k.shape[1] != n_heads
    out = F.scaled_dot_product_attention(
        q, k, v, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=is_grouped
    )  # [n, h, L, d]
    flat = out.transpose(1, 2).reshape(n * length, n_heads * d).index_select(0, layout.scatter)
    return flat.view(1, -1, n_heads, d), None


def _sizes(*parts: Tensor) -> list[int]:
    return [part.shape[-1] for part in parts]


class _Gather(torch.autograd.Function):
    """Flat `[T, C]` to rows `[n * L, C]`; the gradient sums up what several rows share."""

    @staticmethod
    def forward(ctx: Any, flat: Tensor, layout: Layout) -> Tensor:
        ctx.layout = layout
        return flat.index_select(0, layout.gather.flatten())

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> tuple[Tensor, None]:
        return ctx.layout.sum_back(upstream[0]), None
