"""Full-size teachers and GPUs that `deepdistill plan` knows: what their publishers say, each with its source.

Only the fields of a config.json that a plan reads are kept. Any other model is planned from its own config.json.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class KnownModel:
    """A published model. `total` and `active` are the parameters that its model card states, in billions."""

    repo: str
    config: dict[str, Any]
    total: float
    active: float

    @property
    def source(self) -> str:
        """The address of the config.json that the figures were taken from."""
        return f"https://huggingface.co/{self.repo}/blob/main/config.json"


@dataclass(frozen=True)
class Gpu:
    """An accelerator. `memory` in GB (10⁹ bytes, as sold: the card reports no less), `bandwidth` in GB/s."""

    name: str
    memory: float
    bandwidth: float
    fp8: bool
    """Whether it computes in fp8; without it fp8 weights are stored, and widened when they are used."""


_DEEPSEEK_V3 = {
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "vocab_size": 129280,
    "intermediate_size": 18432,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "moe_intermediate_size": 2048,
    "first_k_dense_replace": 3,
    "num_nextn_predict_layers": 1,
    "max_position_embeddings": 163840,
    "tie_word_embeddings": False,
    "quantization_config": {"quant_method": "fp8"},
}
_DEEPSEEK_V2_LITE = {
    "model_type": "deepseek_v2",
    "hidden_size": 2048,
    "num_hidden_layers": 27,
    "vocab_size": 102400,
    "intermediate_size": 10944,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
    "n_shared_experts": 2,
    "moe_intermediate_size": 1408,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 163840,
    "tie_word_embeddings": False,
}
_QWEN3_235B = {
    "model_type": "qwen3_moe",
    "hidden_size": 4096,
    "num_hidden_layers": 94,
    "vocab_size": 151936,
    "intermediate_size": 12288,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 1536,
    "decoder_sparse_step": 1,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
}
_QWEN3_30B = _QWEN3_235B | {
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "intermediate_size": 6144,
    "num_attention_heads": 32,
    "moe_intermediate_size": 768,
}
_QWEN2_32B = {
    "model_type": "qwen2",
    "hidden_size": 5120,
    "num_hidden_layers": 64,
    "vocab_size": 152064,
    "intermediate_size": 27648,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}
_LLAMA_70B = {
    "model_type": "llama",
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "vocab_size": 128256,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}

MODELS = (
    KnownModel("deepseek-ai/DeepSeek-V3", _DEEPSEEK_V3, total=671, active=37),
    KnownModel("deepseek-ai/DeepSeek-R1", _DEEPSEEK_V3, total=671, active=37),
    KnownModel("deepseek-ai/DeepSeek-V2-Lite", _DEEPSEEK_V2_LITE, total=15.7, active=2.4),
    KnownModel("deepseek-ai/DeepSeek-R1-Distill-Qwen-32B", _QWEN2_32B, total=32.8, active=32.8),
    KnownModel("Qwen/Qwen3-235B-A22B", _QWEN3_235B, total=235, active=22),
    KnownModel("Qwen/Qwen3-30B-A3B", _QWEN3_30B, total=30.5, active=3.3),
    KnownModel("Qwen/QwQ-32B", _QWEN2_32B | {"max_position_embeddings": 40960}, total=32.5, active=32.5),
    KnownModel("Qwen/Qwen2.5-32B-Instruct", _QWEN2_32B | {"max_position_embeddings": 32768}, total=32.5, active=32.5),
    KnownModel("meta-llama/Llama-3.3-70B-Instruct", _LLAMA_70B, total=70, active=70),
)

GPUS = (
    # Source: the makers' data sheets, SXM and OAM cards where there are several.
    Gpu("H100", 80, 3350, fp8=True),
    Gpu("H200", 141, 4800, fp8=True),
    Gpu("B200", 192, 8000, fp8=True),
    Gpu("MI300X", 192, 5300, fp8=True),
    Gpu("A100-80", 80, 2039, fp8=False),
    Gpu("A100-40", 40, 1555, fp8=False),
    Gpu("L40S", 48, 864, fp8=True),
    Gpu("RTX 5090", 32, 1792, fp8=True),
    Gpu("RTX 4090", 24, 1008, fp8=True),
)
