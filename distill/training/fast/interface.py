"""Packed rows for any model whose attention goes through transformers' attention interface.

The model's own layers compute everything but attention itself, which is laid out in rows (see `packing`). For what the
fast pass does not know: DoRA, trained weights, other decoders.
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
    if dropout:
        raise ValueError("attention by rows has no dropout")
    n_heads, n_kv_heads, d, d_value = query.shape[1], key.shape[1], query.shape[-1], value.shape[-1]
    value = F.pad(value, (0, d - d_value))  # latent attention has narrower values
    qkv = torch.cat([part[0].transpose(0, 1).flatten(1) for part in (query, key, value)], dim=1)  # [T, (h + 2 h_kv) d]
    scale = d**-0.5 if scaling is None else scaling
    out = row_attention(qkv, layout, cos_sin=None, heads=(n_heads, n_kv_heads), scale=scale)
    return out.view(1, -1, n_heads, d)[..., :d_value], None
