"""Parameters against transformers' own models and the published totals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_config import TINY, counted_by_transformers

from deepdistill.distill.planning.catalogue import MODELS, KnownModel
from deepdistill.distill.planning.parameters import (
    BITS,
    Parameters,
    count_parameters,
    load_shape,
    read_shape,
)
from deepdistill.distill.planning.plan import PlanSettings, plan
from deepdistill.errors import ArtifactError

_SPARSE = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}


VARIANTS: dict[str, dict[str, Any]] = {
    "tied": {"tie_word_embeddings": True},
    "attention bias": {"attention_bias": True},
    "own head dim": {"head_dim": 16},
    "mistral": {"model_type": "mistral"},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "qwen3_moe every second layer": {
        "model_type": "qwen3_moe",
        "num_experts": 6,
        "decoder_sparse_step": 2,
        "head_dim": 16,
        **_SPARSE,
    },
    "qwen3_moe with a dense layer": {"model_type": "qwen3_moe", "num_experts": 6, "mlp_only_layers": [1], **_SPARSE},
    "deepseek_v3": {
        "model_type": "deepseek_v3",
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 8,
        "q_lora_rank": 20,
        "kv_lora_rank": 12,
        "qk_nope_head_dim": 10,
        "qk_rope_head_dim": 4,
        "v_head_dim": 6,
        **_SPARSE,
    },
}


def counted(config: dict[str, Any]) -> Parameters:
    return count_parameters(read_shape(config, "test"))


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.repo)
def test_parameters_are_transformers_own_to_the_last(model: KnownModel) -> None:
    assert counted(model.config).total == counted_by_transformers(model.config)


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_of_every_covered_kind(variant: str) -> None:
    config = TINY | VARIANTS[variant]
    assert counted(config).total == counted_by_transformers(config)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.repo)
def test_totals_are_the_published_ones(model: KnownModel) -> None:
    counts = counted(model.config)
    assert counts.total / 1e9 == pytest.approx(model.total, rel=0.01)
    # Some publishers count the input embedding as active, some do not: 37 B for DeepSeek-V3 without, 3.3 B for
    # Qwen3-30B-A3B with. The two ways embrace the published number, within its rounding.
    assert counts.active * 0.97 <= model.active * 1e9 <= (counts.active + counts.embedding) * 1.02


def test_deepseek_v3_is_671_b_with_37_b_active() -> None:
    counts = counted(next(model.config for model in MODELS if model.repo.endswith("DeepSeek-V3")))
    assert round(counts.total / 1e9) == 671
    assert round(counts.active / 1e9) == 37


def test_fp8_weights_are_the_published_files() -> None:
    """DeepSeek-V3's index says 688,586,727,753 bytes, which hold a 62nd layer (multi-token prediction) as well."""
    shape = load_shape("deepseek-v3")[2]
    counts = count_parameters(shape)
    layer = counts.in_blocks - 3 * 3 * shape.hidden * shape.width  # of the 58 layers with experts, and 3 attentions
    extra = layer / 58 * BITS["fp8"] / 8 + 2 * 2 * counts.embedding + 2 * shape.hidden**2 * 2
    assert counts.bytes("fp8") + extra == pytest.approx(688_586_727_753, rel=0.001)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "cannot read"),
        ("[]", "holds no JSON object"),
        (json.dumps({k: v for k, v in TINY.items() if k != "hidden_size"}), "has no hidden_size"),
        (json.dumps(TINY | {"vocab_size": "many"}), "vocab_size is 'many'"),
        (json.dumps(TINY | {"kv_lora_rank": 4}), "has no qk_nope_head_dim"),
        (json.dumps(TINY | {"num_experts": 4}), "has no num_experts_per_tok"),
        (json.dumps(TINY | {"num_attention_heads": 0}), "num_attention_heads is 0"),
        (json.dumps(TINY | {"text_config": 3}), "text_config"),
        (json.dumps(TINY | {"layer_types": ["linear_attention", "full_attention"]}), "linear_attention"),
    ],
)
def test_a_config_that_will_not_do_is_named(tmp_path: Path, content: str, says: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(ArtifactError) as error:
        plan(PlanSettings(str(path)))
    assert error.value.code == ("model-not-covered" if says == "linear_attention" else "config-broken")
    assert says in error.value.message
    assert error.value.hint


@pytest.mark.parametrize(
    "name", ["deepseek-v3", "DeepSeek-R1", "hf:deepseek-ai/DeepSeek-R1", "deepseek-ai/deepseek-r1"]
)
def test_models_by_any_spelling(name: str) -> None:
    assert plan(PlanSettings(name)).counts.total == 671_026_419_200
