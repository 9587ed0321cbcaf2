"""Gemma 3 (text): norms before and after each block, sliding windows in most layers, and norm weights stored minus 1.

The layers with a window have a RoPE base of their own. llama.cpp takes every sixth layer for a full one unless the file
says otherwise, so any other pattern is written into the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gguf import GGUFWriter

from ..checkpoint import Checkpoint
from .base import Planned
from .qwen3 import Qwen3
from .rope import rope_settings

_PATTERN = 6  # llama.cpp's own


class Gemma3(Qwen3):
    """Gemma3ForCausalLM, which norms q and k as Qwen3 does."""

    name = "gemma3"
    biases = frozenset()
    default_theta = 1_000_000.0

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Fill in the defaults that a config may leave out: tied embeddings, and heads of 256 numbers."""
        checkpoint.config.setdefault("tie_word_embeddings", True)
        checkpoint.config.setdefault("head_dim", 256)
        self.window = int(checkpoint.config.get("sliding_window") or 4096)
        super().__init__(checkpoint)

    @property
    def _local(self) -> dict[str, Any]:
        """The RoPE settings of the layers with a window."""
        if "sliding_attention" in (self.config.get("rope_parameters") or {}):
            return rope_settings(self.config, "sliding_attention")
        return {"rope_type": "default", "rope_theta": self.config.get("rope_local_base_freq") or 10000.0}

    @property
    def _windowed(self) -> list[bool]:
        """Whether each layer has a window."""
        kinds = self.config.get("layer_types")
        step = int(self.config.get("sliding_window_pattern") or _PATTERN)
        if kinds:
            return [kind == "sliding_attention" for kind in kinds]
        return [bool((i + 1) % step) for i in range(self.n_layers)]

    def faults(self) -> dict[str, Any]:
        """Return the settings that llama.cpp's graph lacks."""
        scalar = self.config.get("query_pre_attn_scalar", 256)
        # llama.cpp tells the 27B model, whose scale is another, by its number of layers.
        scale = self.n_embd // self.n_heads if self.n_layers == 62 else self.head_dim
        activation = self.config.get("hidden_activation", "gelu_pytorch_tanh")
        return super().faults() | {
            "sliding-window attention": False,
            "hidden_act": activation != "gelu_pytorch_tanh",
            "attn_logit_softcapping": self.config.get("attn_logit_softcapping"),
            "bidirectional attention": self.config.get("use_bidirectional_attention"),
            f"query_pre_attn_scalar {scalar}": scalar != scale,
            "scaled RoPE in the layers with a window": self._local["rope_type"] != "default",
            f"{len(self._windowed)} layer_types": len(self._windowed) != self.n_layers,
        }

    def norm(self, name: str, source: str, n: int = 0) -> Iterator[Planned]:
        """Yield the weight of a norm, which transformers stores minus 1."""
        yield from self.take(name, source, shape=(n or self.n_embd,), change=lambda rows: rows + 1)

    def layer(self, i: int, new: str, old: str) -> Iterator[Planned]:
        """Yield the tensors of a layer, which has two norms more."""
        yield from self.norm(f"{new}attn_norm.weight", f"{old}input_layernorm.weight")
        yield from self.attention(new, f"{old}self_attn.")
        yield from self.norm(f"{new}post_attention_norm.weight", f"{old}post_attention_layernorm.weight")
        yield from self.norm(f"{new}ffn_norm.weight", f"{old}pre_feedforward_layernorm.weight")
        yield from self.mlp(i, new, f"{old}mlp.")
        yield from self.norm(f"{new}post_ffw_norm.weight", f"{old}post_feedforward_layernorm.weight")

    def write_parameters(self, writer: GGUFWriter) -> None:
        """Add the window, its pattern and the second RoPE base too."""
        super().write_parameters(writer)
        writer.add_sliding_window(self.window)
        writer.add_rope_freq_base_swa(float(self._local.get("rope_theta") or 10000.0))
        if self._windowed != [bool((i + 1) % _PATTERN) for i in range(self.n_layers)]:
            writer.add_sliding_window_pattern(self._windowed)
        if cap := self.config.get("final_logit_softcapping"):
            writer.add_final_logit_softcapping(float(cap))
