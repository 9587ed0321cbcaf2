"""The fast pass, and the students that it can compute.

It computes decoders built like Llama's (SmolLM2, Llama 3, Mistral, Qwen 2 and their kin): RMS norms before attention
and before a gated SiLU MLP, rotary embeddings by halves, weights that are frozen or have plain LoRA. The structure is
not trusted alone: `fast_decoder` compares both passes on a few tokens, and returns None if they differ.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..packing import Batch, Layout, pack
from ..rows import Row
from .blocks import gated_mlp_onto, linear_onto, normed_linears, row_attention
from .linears import Linears, is_plain, refresh

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
_NORMS = ("input_layernorm", "post_attention_layernorm")


class _Layer:
    """One decoder layer: x + attention(norm(x)), then the same with the MLP."""

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._norms = [getattr(layer, name) for name in _NORMS]
        self._qkv = Linears([attention.q_proj, attention.k_proj, attention.v_proj])
        self._o = Linears([attention.o_proj])
        self._gate_up = Linears([mlp.gate_proj, mlp.up_proj])
        self._down = Linears([mlp.down_proj])
        self._scale = attention.scaling
        self._heads = (
            attention.q_proj.out_features // attention.head_dim,
            attention.k_proj.out_features // attention.head_dim,
        )
        linears = (self._qkv, self._o, self._gate_up, self._down)
        self.adapters = [adapter for each in linears for adapter in each.adapters]

    def __call__(self, x: Tensor, cos_sin: tuple[Tensor, Tensor], layout: Layout) -> Tensor:
        """Return the layer's output `[T, H]`."""
        before_attention, before_mlp = self._norms
        qkv = normed_linears(x, self._qkv, norm=before_attention.weight, eps=before_attention.variance_epsilon)
        attention = row_attention(qkv, layout, cos_sin=cos_sin, heads=self._heads, scale=self._scale)
        x = linear_onto(x, attention, self._o)
        eps = before_mlp.variance_epsilon
        return gated_mlp_onto(x, norm=before_mlp.weight, eps=eps, gate_up=self._gate_up, down=self._down)


class FastDecoder:
    """The decoder of a causal language model, from token ids to the last normalised states."""

    def __init__(self, decoder: Any) -> None:
        self._decoder = decoder
        self.layers = [_Layer(layer) for layer in decoder.layers]
        self._adapters = [adapter for layer in self.layers for adapter in layer.adapters]

    def __call__(self, input_ids: Tensor, layout: Layout) -> Tensor:
        """Return the states `[T, H]` of packed ids `[1, T]`."""
        self.refresh()
        x: Tensor = self._decoder.embed_tokens(input_ids)[0]
        cos_sin = self.cos_sin(x, layout)
        for layer in self.layers:
            x = layer(x, cos_sin, layout)
        states: Tensor = self._decoder.norm(x)
        return states

    def refresh(self) -> None:
        """Copy the adapters, which the optimizer has changed, into the joint matrices."""
        refresh(self._adapters)

    def cos_sin(self, x: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        """Return the rotary cos and sin `[L, d]` of the positions in a row."""
        positions = torch.arange(layout.gather.shape[1], device=x.device)[None]
        cos, sin = self._decoder.rotary_emb(x, positions)
        return cos[0], sin[0]


def fast_decoder(causal_lm: Any) -> FastDecoder | None:
    """Return the fast pass of a model that is on its device already, or None if it would not be exact.

    The linear modules' weights become views of joint matrices; the rest of the model stays as it is.
    """
    decoder = causal_lm.get_decoder()
    if not _is_llama_like(decoder):
        return None
    rows = [Row([1 + (7 * i + 3 * j) % 11 for i in range(5 + j)], 1) for j in range(3)]
    batch = pack(rows)
    fast = FastDecoder(decoder)
    with torch.no_grad():
        return fast if _agrees(fast, decoder, batch) else None


def _agrees(fast: FastDecoder, decoder: Any, batch: Batch) -> bool:
    """Say whether each layer changes the plain decoder's states as the plain layer does, up to rounding."""
    assert batch.layout is not None
    device = next(decoder.parameters()).device
    layout = batch.layout.to(device)
    padded = batch.input_ids[0].to(device)[layout.gather]  # [n, L], each row by itself
    plain = decoder(input_ids=padded, use_cache=False, output_hidden_states=True).hidden_states
    # The embedding, then the states after each layer; the last of them are after the norm.
    states = [state.flatten(0, 1)[layout.scatter] for state in plain]
    cos_sin = fast.cos_sin(states[0], layout)
    fast.refresh()
    tolerance = 1e-4 if states[0].dtype == torch.float32 else 3e-2
    for i, (layer, before, after) in enumerate(zip(fast.layers, states, states[1:], strict=False)):
        found = layer(before, cos_sin, layout)
        if i == len(fast.layers) - 1:
            found, before = decoder.norm(found), torch.zeros_like(before)
        # The error of what the layer adds, per token, with room for the states' own rounding. One token in five may be
        # off: a few have huge states, whose rounding hides what the layer adds.
        error = (found.float() - after.float()).norm(dim=1)
        allowed = tolerance * ((after.float() - before.float()).norm(dim=1) + after.float().norm(dim=1) / 8)
        if not (error <= allowed).float().mean() > 0.8:
            return False
    return True


def _is_llama_like(decoder: Any) -> bool:
    """Say whether every layer has exactly the parts that the fast pass computes."""
    if not hasattr(decoder, "rotary_emb") or not hasattr(getattr(decoder, "norm", None), "variance_epsilon"):
        return False
    return all(_is_known_layer(layer) for layer in getattr(decoder, "layers", [None]))


def _is_known_layer(layer: Any) -> bool:
    parts: dict[str, Any] = {name: getattr(layer, name, None) for name in ("self_attn", "mlp", *_NORMS)}
    if None in parts.values() or {name for name, _ in layer.named_children()} != set(parts):
        return False
    children = {name for part in ("self_attn", "mlp") for name, _ in parts[part].named_children()}
    linears: list[Any] = [getattr(parts["self_attn"], name, None) for name in _ATTENTION]
    linears += [getattr(parts["mlp"], name, None) for name in _MLP]
    act = getattr(parts["mlp"], "act_fn", None)
    is_silu = isinstance(act, nn.SiLU) or "SiLU" in type(act).__name__
    norms = [parts[name] for name in _NORMS]
    return (
        None not in linears
        and children <= {*_ATTENTION, *_MLP, "act_fn"}
        and all(is_plain(linear) for linear in linears)
        and all(hasattr(norm, "variance_epsilon") and not norm.weight.requires_grad for norm in norms)
        and is_silu
        and not getattr(parts["self_attn"], "attention_dropout", 0.0)
        and getattr(parts["self_attn"], "sliding_window", None) is None
    )
