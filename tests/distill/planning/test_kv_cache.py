"""The cache of a token against published tables."""

from __future__ import annotations

from typing import Any

import pytest
from tiny_config import TINY

from deepdistill.distill.planning.catalogue import MODELS
from deepdistill.distill.planning.parameters import (
    read_shape,
)
from deepdistill.distill.planning.plan import PlanSettings, plan


@pytest.mark.parametrize(
    ("config", "published"),
    [
        # Source: Insights into DeepSeek-V3, arXiv 2505.09343, table 1: KV cache a token in KB (10³ bytes), BF16.
        (next(model.config for model in MODELS if model.repo.endswith("DeepSeek-V3")), 70_272),
        (
            {"num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "hidden_size": 8192},
            327_680,
        ),  # Qwen2.5 72B
        (
            {"num_hidden_layers": 126, "num_attention_heads": 128, "num_key_value_heads": 8, "hidden_size": 16384},
            516_096,
        ),  # Llama 3.1 405B
    ],
    ids=["DeepSeek-V3", "Qwen2.5-72B", "Llama-3.1-405B"],
)
def test_the_cache_is_the_published_one(config: dict[str, Any], published: int) -> None:
    shape = read_shape(TINY | config, "test")
    assert shape.kv_numbers * 2 == published


def test_latent_attention_caches_what_the_paper_says_against_plain_heads() -> None:
    made = plan(PlanSettings("DeepSeek-V3"))
    # Source: arXiv 2405.04434, table 1: d_c + d_h^R numbers a layer, against n_h heads of keys and values.
    assert made.load.cache_bytes == 61 * (512 + 64) * 2
    assert made.plain_cache_bytes == 61 * 128 * (192 + 128) * 2
