"""Qwen3-MoE: a Qwen3 whose feed-forward network is a set of experts, a few of which are used for each token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from ..checkpoint import Checkpoint
from .base import Planned
from .qwen3 import Qwen3


class Qwen3Moe(Qwen3):
    """Qwen3MoeForCausalLM."""

    name = "qwen3moe"
    biases: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Read the experts' numbers too."""
        super().__init__(checkpoint)
        # transformers 5 calls it num_local_experts in memory, and writes either.
        self.n_experts = self.number("num_experts" if "num_experts" in self.config else "num_local_experts")
        self.n_ff_expert = self.number("moe_intermediate_size")

    def faults(self) -> dict[str, Any]:
        """Add layers without experts, and routing weights that do not sum to 1: llama.cpp always normalizes them."""
        sparse = int(self.config.get("decoder_sparse_step") or 1) == 1 and not self.config.get("mlp_only_layers")
        return super().faults() | {
            "dense layers among the sparse": not sparse,
            "norm_topk_prob off": not self.config.get("norm_topk_prob"),
        }

    def mlp(self, i: int, new: str, old: str) -> Iterator[Planned]:
        """Yield a layer's router and its experts, stacked."""
        yield from self.take(f"{new}ffn_gate_inp.weight", f"{old}gate.weight", shape=(self.n_experts, self.n_embd))
        yield from self.experts(new, old, self.n_ff_expert)
