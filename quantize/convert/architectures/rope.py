"""RoPE settings: from transformers' config, old or new, to a GGUF's keys."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGUFWriter, RopeScalingType

from ....errors import ArtifactError


def rope_settings(config: dict[str, Any], layers: str = "full_attention") -> dict[str, Any]:
    """Return the RoPE settings as transformers 5 writes them; those of one kind of layer if the kinds differ.

    Raises:
        ArtifactError: `code` "config-broken": a scaling has no factor.
    """
    found = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    if isinstance(found.get(layers), dict):
        found = dict(found[layers])
    found["rope_type"] = found.get("rope_type") or found.get("type") or "default"
    found.setdefault("rope_theta", config.get("rope_theta"))
    found.setdefault("partial_rotary_factor", config.get("partial_rotary_factor"))
    if found["rope_type"] in ("linear", "yarn", "llama3") and not found.get("factor"):
        raise ArtifactError(f"config.json has {found['rope_type']} RoPE scaling without a factor", code="config-broken")
    return found


def write_rope(writer: GGUFWriter, rope: dict[str, Any], config: dict[str, Any]) -> None:
    """Add linear or YaRN scaling to a file's metadata."""
    kind = rope["rope_type"]
    if kind not in ("linear", "yarn"):
        return
    factor = float(rope["factor"])
    writer.add_rope_scaling_type(RopeScalingType.LINEAR if kind == "linear" else RopeScalingType.YARN)
    writer.add_rope_scaling_factor(factor)
    if kind != "yarn":
        return
    original = rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
    writer.add_rope_scaling_orig_ctx_len(int(original))
    writer.add_rope_scaling_yarn_beta_fast(float(rope.get("beta_fast") or 32))
    writer.add_rope_scaling_yarn_beta_slow(float(rope.get("beta_slow") or 1))
    if attention := rope.get("attention_factor"):
        # transformers takes it as the whole factor; llama.cpp multiplies it by YaRN's default.
        default = 1 + 0.1 * math.log(factor) if factor > 1 else 1.0
        writer.add_rope_scaling_attn_factors(float(attention) / default)


def llama3_factors(rope: dict[str, Any], head_dim: int) -> npt.NDArray[np.float32]:
    """Return the divisor of each RoPE frequency `[head_dim / 2]` under Llama 3's scaling.

    Long waves are slowed down by `factor`, short ones stay, those between are interpolated.

    Source: transformers, modeling_rope_utils._compute_llama3_parameters; in float32, as llama.cpp's converter computes.
    """
    low, high = float(rope.get("low_freq_factor", 1)), float(rope.get("high_freq_factor", 4))
    original, factor = float(rope.get("original_max_position_embeddings", 8192)), float(rope["factor"])
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    # The power is computed in float64: in float32 its last bit differs from processor to processor.
    powers = float(rope.get("rope_theta") or 10000.0) ** exponents.astype(np.float64)
    frequencies = 1 / powers.astype(np.float32)
    waves = np.float32(2 * np.pi) / frequencies
    smooth = np.clip((np.float32(original) / waves - np.float32(low)) / np.float32(high - low), 0, 1)
    between = 1 / ((1 - smooth) / np.float32(factor) + smooth)
    return np.where(waves < original / high, 1, np.where(waves > original / low, factor, between)).astype(np.float32)
