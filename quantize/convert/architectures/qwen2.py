"""Qwen2 and Qwen2.5: a llama with biases on q, k and v, whose rows stay where they are."""

from __future__ import annotations

from typing import Any, ClassVar

from .base import Architecture


class Qwen2(Architecture):
    """Qwen2ForCausalLM."""

    name = "qwen2"
    biases: ClassVar[frozenset[str]] = frozenset({"attn_q", "attn_k", "attn_v"})

    def faults(self) -> dict[str, Any]:
        """Add a head size that its graph cannot have."""
        odd = self.head_dim * self.n_heads != self.n_embd
        return super().faults() | {"a head size that is not hidden_size / heads": odd}
