"""Llama: q and k rows change places, and Llama 3's RoPE scaling becomes a tensor of factors.

In a llama's head, llama.cpp rotates neighbouring rows as pairs; transformers pairs the two halves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import ClassVar

import numpy as np

from .base import ATTENTION, MLP, Architecture, Floats, Planned
from .rope import llama3_factors


class Llama(Architecture):
    """LlamaForCausalLM."""

    name = "llama"
    biases: ClassVar[frozenset[str]] = frozenset({*ATTENTION.values(), *MLP.values()})
    rope_types: ClassVar[frozenset[str]] = Architecture.rope_types | {"llama3"}  # only its graph reads the factors

    def layout(self) -> Iterator[Planned]:
        """Yield the tensors of the file."""
        layout = super().layout()
        yield next(layout)
        if self.rope["rope_type"] == "llama3":
            factors = llama3_factors(self.rope, self.head_dim)
            yield Planned("rope_freqs.weight", factors.shape, lambda _part_size: iter([factors]))
        yield from layout

    def take(
        self,
        name: str,
        source: str,
        *,
        shape: tuple[int, ...],
        change: Callable[[Floats], Floats] | None = None,
        stored: tuple[int, ...] | None = None,
        unit: int = 1,
    ) -> Iterator[Planned]:
        """Yield one tensor; the rows of q and k are permuted, a head at a time."""
        if name.split(".")[-2] in ("attn_q", "attn_k"):
            change, unit = self._permute, self.head_dim
        yield from super().take(name, source, shape=shape, change=change, stored=stored, unit=unit)

    def _permute(self, rows: Floats) -> Floats:
        return permute(rows, rows.shape[0] // self.head_dim)


def permute(rows: Floats, n_heads: int) -> Floats:
    """Interleave the two halves of each head's rows `[n_heads * head_dim, ...]`: 0, d/2, 1, d/2 + 1, …"""
    halves = rows.reshape(n_heads, 2, rows.shape[0] // n_heads // 2, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows.shape))
