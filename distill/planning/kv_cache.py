"""How many numbers a KV cache holds for a token, from the config.json of a Hugging Face checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Assumed of a config that does not say: a model of some 7 B parameters.
_HIDDEN_SIZE, _N_LAYERS = 4096, 32


def kv_numbers(config: Mapping[str, Any]) -> tuple[int, int]:
    """Return (numbers a token in the cache of all layers, as many with plain multi-head attention).

    Plain attention keeps a key and a value for every head. Grouped queries keep fewer heads; latent attention (arXiv
    2405.04434) keeps one compressed vector and one rotary key for all heads together.
    """
    n_layers = config.get("num_hidden_layers") or _N_LAYERS
    n_heads = config.get("num_attention_heads") or 1
    if (latent := config.get("kv_lora_rank")) is not None:
        rotary = config["qk_rope_head_dim"]
        plain = n_heads * (config["qk_nope_head_dim"] + rotary + config["v_head_dim"])
        return n_layers * (latent + rotary), n_layers * plain
    head_dim = config.get("head_dim") or (config.get("hidden_size") or _HIDDEN_SIZE) // n_heads
    n_kv_heads = config.get("num_key_value_heads") or n_heads
    return n_layers * 2 * n_kv_heads * head_dim, n_layers * 2 * n_heads * head_dim
