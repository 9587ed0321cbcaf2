"""Qwen2 and Qwen2.5: a llama with biases on q, k and v, and without the permutation of their rows."""

from __future__ import annotations

from typing import Any, ClassVar

from .base import Architecture


class Qwen2(Architecture):
    """Qwen2ForCausalLM."""

    name = "qwen2"
    biases: ClassVar[frozenset[str]] = frozenset({"attn_q", "attn_k", "attn_v"})

    def faults(self) -> dict[str, Any]:
        """Add head sizes that llama.cpp's graph lacks."""
        is_odd = self.head_dim * self.n_heads != self.n_embd
        return super().faults() | {"a head size that is not hidden_size / heads": is_odd}
