"""Qwen3: a norm on each head's q and k."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from .base import Architecture, Planned


class Qwen3(Architecture):
    """Qwen3ForCausalLM."""

    name = "qwen3"
    biases: ClassVar[frozenset[str]] = frozenset({"attn_q", "attn_k", "attn_v"})

    def attention(self, new: str, old: str) -> Iterator[Planned]:
        """Yield a layer's attention with its two norms."""
        yield from super().attention(new, old)
        for part in ("q", "k"):
            yield from self.norm(f"{new}attn_{part}_norm.weight", f"{old}{part}_norm.weight", self.head_dim)
