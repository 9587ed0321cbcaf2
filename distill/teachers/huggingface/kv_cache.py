"""KV caches for decoding: one that grows in place and is cut by row and column, and attention to cached latents.

A row's columns are `[shared prefix | padding | the rest of its prompt and its answer]`.

Multi-head latent attention: DeepSeek's cache holds a compressed latent of each token, and transformers expands all of
them to keys and values again at every step. The matrices that expand them can be multiplied into the query and the
output instead ("absorbed"): then a step reads the latents as they are, and all heads share them as in multi-query
attention.

Source: DeepSeek-V2, arXiv 2405.04434, section 2.1.2.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

_NAME = "deepdistill_latent"
_SPARE = 64  # columns added beyond what is needed


class GrowingLayer(DynamicLayer):
    """A cache layer that keeps spare columns and appends in place, where DynamicLayer copies everything each token."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.n = 0
        self.buffers: tuple[torch.Tensor, torch.Tensor] | None = None  # keys and values, [B, H, capacity, D] each

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append `[B, H, T, D]` states and return all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.n + key_states.shape[-2]
        if self.buffers is None:
            self.buffers = (_with_capacity(key_states, end + _SPARE), _with_capacity(value_states, end + _SPARE))
        elif end > self.buffers[0].shape[-2]:
            self.buffers = (_with_capacity(self.buffers[0], 2 * end), _with_capacity(self.buffers[1], 2 * end))
        keys, values = self.buffers
        keys[..., self.n : end, :] = key_states
        values[..., self.n : end, :] = value_states
        self.n = end
        self.keys, self.values = self.states
        return self.keys, self.values

    @property
    def states(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values in use, `[B, H, T, D]`."""
        assert self.buffers
        keys, values = self.buffers
        return keys[..., : self.n, :], values[..., : self.n, :]

    def keep(self, rows: torch.Tensor, columns: torch.Tensor) -> None:
        """Drop all other rows and columns."""
        device = self.states[0].device
        self._replace(*(x.index_select(0, rows.to(device)).index_select(2, columns.to(device)) for x in self.states))

    def put_under(self, other: GrowingLayer, width: int, n_prefix: int) -> None:
        """Add the rows of another layer, both aligned at the newest column of `width`."""
        pairs = zip(self.states, other.states, strict=True)
        self._replace(*(stack_rows(above, below, width=width, n_prefix=n_prefix) for above, below in pairs))

    def _replace(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.n = keys.shape[-2]
        self.buffers = (_with_capacity(keys, self.n + _SPARE), _with_capacity(values, self.n + _SPARE))
        self.keys, self.values = self.states


def stack_rows(above: torch.Tensor, below: torch.Tensor, *, width: int, n_prefix: int) -> torch.Tensor:
    """Stack two `[B, H, T, D]` by row, padded after the prefix to one width; with zeros, as NaN would pass a mask."""
    stacked = above.new_zeros(len(above) + len(below), above.shape[1], width, above.shape[3])
    for part, rows in ((above, stacked[: len(above)]), (below, stacked[len(above) :])):
        rows[:, :, :n_prefix] = part[:, :, :n_prefix]
        rows[:, :, width - part.shape[2] + n_prefix :] = part[:, :, n_prefix:]
    return stacked


def _with_capacity(states: torch.Tensor, capacity: int) -> torch.Tensor:
    """Return a buffer `[B, H, capacity, D]` that begins with the states."""
    batch, heads, n, size = states.shape
    buffer = states.new_empty(batch, heads, capacity, size)
    buffer[..., :n, :] = states
    return buffer


class LatentAttention:
    """Lets a model whose cache holds latents attend to them; other models work as usual."""

    def __init__(self, model: Any) -> None:
        modules = [module for module in model.modules() if hasattr(module, "expand_kv")]
        self._config = model.config
        # An adapter's or a quantized layer multiplies with another matrix than `weight`.
        self._modules = modules if all(type(module.kv_b_proj) is nn.Linear for module in modules) else []
        AttentionInterface.register(_NAME, _attend)
        AttentionMaskInterface.register(_NAME, sdpa_mask)

    @contextmanager
    def one_token(self) -> Iterator[None]:
        """Use the absorbed matrices in passes of one new token a row, the only ones that they make faster."""
        if not self._modules:
            yield
            return
        attention = self._config._attn_implementation
        self._config._attn_implementation = _NAME
        for module in self._modules:
            module.expand_kv = _unexpanded
        try:
            yield
        finally:
            self._config._attn_implementation = attention
            for module in self._modules:
                del module.expand_kv


def _unexpanded(latents: Tensor, k_rot: Tensor) -> tuple[Tensor, Tensor]:
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
