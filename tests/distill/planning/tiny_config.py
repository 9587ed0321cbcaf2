"""A tiny decoder's config.json, and its parameters as transformers counts them."""

from __future__ import annotations

from typing import Any

TINY: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "vocab_size": 100,
    "intermediate_size": 96,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}


def counted_by_transformers(config: dict[str, Any]) -> int:
    """Build the model without memory and add up its tensors, the routers' correction biases among them."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {name: value for name, value in config.items() if name not in ("model_type", "quantization_config")}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **fields))
    biases = (tensor for name, tensor in model.named_buffers() if "e_score_correction_bias" in name)
    return sum(tensor.numel() for tensor in [*model.parameters(), *biases])
