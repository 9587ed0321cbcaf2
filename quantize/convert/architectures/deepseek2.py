"""DeepSeek V2, V3 and R1: latent attention, shared experts, and first layers without experts.

llama.cpp multiplies the query into the latent space instead of the keys out of it, so `kv_b` becomes two stacks of one
matrix a head: `k_b` transposed, and `v_b`. The cache then holds one latent head, so the file has one KV head. V3
chooses experts by sigmoid and a bias learned for balance, V2 by softmax. The layers that predict more than one token
ahead (multi-token prediction) are left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from gguf import ExpertGatingFuncType, GGUFWriter

from ..checkpoint import Checkpoint
from .base import MLP, Architecture, Floats, Planned

_LITE = (26, 27)
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


class DeepSeek2(Architecture):
    """DeepseekV2ForCausalLM and DeepseekV3ForCausalLM."""

    name = "deepseek2"

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Read the numbers of the latent space and of the experts too."""
        config = checkpoint.config
        self.is_v3 = (config.get("architectures") or [""])[0] == "DeepseekV3ForCausalLM"
        self.q_rank = int(config.get("q_lora_rank") or 0)
        super().__init__(checkpoint)
        self.kv_rank, self.n_rope = self.number("kv_lora_rank"), self.number("qk_rope_head_dim")
        self.n_nope, self.n_value = self.number("qk_nope_head_dim"), self.number("v_head_dim")
        self.n_query, self.n_kv_heads = self.n_nope + self.n_rope, 1
        self.n_experts = self.number("n_routed_experts")
        self.n_ff_expert = self.number("moe_intermediate_size")
        self.n_shared = int(config.get("n_shared_experts") or 0)
        self.n_dense = int(config.get("first_k_dense_replace") or 0)

    def faults(self) -> dict[str, Any]:
        """Return the settings that llama.cpp's graph lacks."""
        every, all_dim = self.rope.get("mscale"), self.rope.get("mscale_all_dim")
        yarn = self.rope["rope_type"] == "yarn"
        grouped = not self.is_v3 and self.config.get("topk_method", "greedy") != "greedy"
        return super().faults() | {
            "YaRN's mscale": yarn and (not all_dim or every != all_dim),
            "RoPE that is not interleaved": self.config.get("rope_interleave") is False,
            "experts in groups by their best one (DeepSeek-V2's group_limited_greedy)": grouped,
            "layers without experts between those with": int(self.config.get("moe_layer_freq") or 1) != 1,
            "no shared experts": not self.config.get("n_shared_experts"),
            # llama.cpp takes a model with this many layers for a lite one, which has no low-rank query.
            f"a low-rank query in {self.n_layers} layers": bool(self.q_rank) and self.n_layers in _LITE,
        }

    def ignores(self, name: str) -> bool:
        """Leave out the layers of multi-token prediction too."""
        layer = _LAYER.match(name)
        return super().ignores(name) or bool(layer and int(layer[1]) >= self.n_layers)

    def attention(self, new: str, old: str) -> Iterator[Planned]:
        """Yield a layer's latent attention."""
        q = self.n_heads * self.n_query
        if self.q_rank:
            yield from self.linear(f"{new}attn_q_a", f"{old}q_a_proj", (self.q_rank, self.n_embd))
            yield from self.norm(f"{new}attn_q_a_norm.weight", f"{old}q_a_layernorm.weight", self.q_rank)
            yield from self.linear(f"{new}attn_q_b", f"{old}q_b_proj", (q, self.q_rank))
        else:
            yield from self.linear(f"{new}attn_q", f"{old}q_proj", (q, self.n_embd))
        latent = (self.kv_rank + self.n_rope, self.n_embd)
        yield from self.linear(f"{new}attn_kv_a_mqa", f"{old}kv_a_proj_with_mqa", latent)
        yield from self.norm(f"{new}attn_kv_a_norm.weight", f"{old}kv_a_layernorm.weight", self.kv_rank)
        unit = self.n_nope + self.n_value
        for part, shape, change in (
            ("k_b", (self.n_heads, self.kv_rank, self.n_nope), self._keys),
            ("v_b", (self.n_heads, self.n_value, self.kv_rank), self._values),
        ):
            yield from self.take(
                f"{new}attn_{part}.weight",
                f"{old}kv_b_proj.weight",
                shape=shape,
                change=change,
                stored=(self.n_heads * unit, self.kv_rank),
                unit=unit,
            )
        yield from self.linear(f"{new}attn_output", f"{old}o_proj", (self.n_embd, self.n_heads * self.n_value))

    def _heads(self, rows: Floats) -> Floats:
        return rows.reshape(-1, self.n_nope + self.n_value, self.kv_rank)

    def _keys(self, rows: Floats) -> Floats:
        return np.ascontiguousarray(self._heads(rows)[:, : self.n_nope].swapaxes(1, 2)).reshape(-1, self.n_nope)

    def _values(self, rows: Floats) -> Floats:
        return np.ascontiguousarray(self._heads(rows)[:, self.n_nope :]).reshape(-1, self.kv_rank)

    def mlp(self, i: int, new: str, old: str) -> Iterator[Planned]:
        """Yield a layer's router, stacked experts and shared expert; of a first layer its dense network."""
        if i < self.n_dense:
            yield from super().mlp(i, new, old)
            return
        yield from self.take(f"{new}ffn_gate_inp.weight", f"{old}gate.weight", shape=(self.n_experts, self.n_embd))
        bias = f"{old}gate.e_score_correction_bias"
        if self.is_v3 and bias in self.checkpoint.tensors:
            yield from self.take(f"{new}exp_probs_b.bias", bias, shape=(self.n_experts,))
        yield from self.experts(new, old, self.n_ff_expert)
        wide = self.n_ff_expert * self.n_shared
        for source, part in MLP.items():
            shape = (self.n_embd, wide) if part == "ffn_down" else (wide, self.n_embd)
            yield from self.linear(f"{new}{part}_shexp", f"{old}shared_experts.{source}", shape)

    def write_parameters(self, writer: GGUFWriter) -> None:
        """Add the shared experts and how experts are chosen too."""
        super().write_parameters(writer)
        writer.add_leading_dense_block_count(self.n_dense)
        writer.add_expert_shared_count(self.n_shared)
        writer.add_expert_weights_scale(float(self.config.get("routed_scaling_factor") or 1.0))
        gating = ExpertGatingFuncType.SIGMOID if self.is_v3 else ExpertGatingFuncType.SOFTMAX
        writer.add_expert_gating_func(gating)
        if self.is_v3:  # transformers' V2 reads none of these
            writer.add_expert_weights_norm(bool(self.config.get("norm_topk_prob", True)))
            writer.add_expert_group_count(int(self.config.get("n_group") or 1))
            writer.add_expert_group_used_count(int(self.config.get("topk_group") or 1))
        if scale := self.rope.get("mscale_all_dim"):
            writer.add_rope_scaling_yarn_log_mul(0.1 * float(scale))  # llama.cpp divides by 0.1 again

    def write_heads(self, writer: GGUFWriter) -> None:
        """Add the sizes of the latent space and of the heads."""
        if self.n_layers not in _LITE:
            writer.add_q_lora_rank(self.q_rank)  # 0 if there is none: llama.cpp requires the key
        writer.add_kv_lora_rank(self.kv_rank)
        writer.add_key_length(self.kv_rank + self.n_rope)
        writer.add_value_length(self.kv_rank)
        writer.add_key_length_mla(self.n_query)
        writer.add_value_length_mla(self.n_value)
        writer.add_rope_dimension_count(self.n_rope)
