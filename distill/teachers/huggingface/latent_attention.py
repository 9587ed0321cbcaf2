"""Multi-head latent attention for decoding: the new token looks at the cached latents themselves.

DeepSeek's cache holds a compressed latent of each token, and transformers expands all of them to keys and values again
at every step. The matrices that expand them can be multiplied into the query and the output instead ("absorbed"): then
a step reads the latents as they lie, and all heads share them as in multi-query attention.

Source: DeepSeek-V2, arXiv 2405.04434, section 2.1.2.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

_NAME = "deepdistill_latent"


class LatentAttention:
    """Lets a model whose cache holds latents attend to them; other models go on as they do."""

    def __init__(self, model: Any) -> None:
        modules = [module for module in model.modules() if hasattr(module, "expand_kv")]
        self._config = model.config
        # an adapter's or a quantized weight is another matrix than `weight`
        self._modules = modules if all(type(module.kv_b_proj) is nn.Linear for module in modules) else []
        AttentionInterface.register(_NAME, _attend)
        AttentionMaskInterface.register(_NAME, sdpa_mask)

    @contextmanager
    def one_token(self) -> Iterator[None]:
        """Take the absorbed matrices for passes of one new token a row, the only ones that they make faster."""
        if not self._modules:
            yield
            return
        attention = self._config._attn_implementation
        self._config._attn_implementation = _NAME
        for module in self._modules:
            module.expand_kv = _as_they_are
        try:
            yield
        finally:
            self._config._attn_implementation = attention
            for module in self._modules:
                del module.expand_kv


def _as_they_are(latents: Tensor, k_rot: Tensor) -> tuple[Tensor, Tensor]:
    return latents, k_rot


def _attend(
    module: Any,
    query: Tensor,
    latents: Tensor,
    k_rot: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """Return attention `[B, 1, h, d_v]` of query `[B, h, 1, d_k + d_rot]` to latents `[B, 1, T, r]` and k_rot."""
    n_heads, d_key, d_value = query.shape[1], module.qk_nope_head_dim, module.v_head_dim
    to_key, to_value = module.kv_b_proj.weight.view(n_heads, d_key + d_value, -1).split([d_key, d_value], dim=1)
    q_pass, q_rot = query.squeeze(2).split([d_key, query.shape[-1] - d_key], dim=-1)  # [B, h, d]
    latents, k_rot = latents.squeeze(1), k_rot.squeeze(1)  # [B, T, r], [B, T, d_rot]
    q_latent = torch.bmm(q_pass.transpose(0, 1), to_key).transpose(0, 1)  # [B, h, r]
    scores = torch.bmm(q_latent, latents.transpose(1, 2))
    scores = torch.baddbmm(scores, q_rot, k_rot.transpose(1, 2)).mul_(scaling)  # [B, h, T]
    if attention_mask is not None:
        scores.masked_fill_(~attention_mask.squeeze(1), float("-inf"))
    p = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    mixed = torch.bmm(p, latents).transpose(0, 1)  # [h, B, r]
    return torch.bmm(mixed, to_value.transpose(1, 2)).transpose(0, 1)[:, None], None
