"""A plan's figures against transformers' own models, published totals, and layouts that servers recommend."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from deepdistill.distill.planning.catalogue import GPUS, MODELS, KnownModel
from deepdistill.distill.planning.layouts import USED_SHARE, Load, gpu_layouts
from deepdistill.distill.planning.parameters import (
    BITS,
    Dtype,
    Parameters,
    count_parameters,
    load_shape,
    read_shape,
)
from deepdistill.distill.planning.plan import PlanSettings, ServingPlan, find_gpu, plan
from deepdistill.distill.planning.text import plan_json, print_plan
from deepdistill.distill.teachers.budget import Price
from deepdistill.errors import ArtifactError, UsageError

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


def counted_by_transformers(config: dict[str, Any]) -> int:
    """Build the model without memory and add up its tensors, the routers' correction biases among them."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {name: value for name, value in config.items() if name not in ("model_type", "quantization_config")}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **fields))
    biases = (tensor for name, tensor in model.named_buffers() if "e_score_correction_bias" in name)
    return sum(tensor.numel() for tensor in [*model.parameters(), *biases])


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


def test_fp8_weights_are_the_published_files() -> None:
    """DeepSeek-V3's index says 688,586,727,753 bytes, which hold a 62nd layer (multi-token prediction) as well."""
    shape = load_shape("deepseek-v3")[2]
    counts = count_parameters(shape)
    layer = counts.in_blocks - 3 * 3 * shape.hidden * shape.width  # of the 58 layers with experts, and 3 attentions
    extra = layer / 58 * BITS["fp8"] / 8 + 2 * 2 * counts.embedding + 2 * shape.hidden**2 * 2
    assert counts.bytes("fp8") + extra == pytest.approx(688_586_727_753, rel=0.001)


# Source: SGLang's table of configurations for DeepSeek-V3 and R1, docs/basic_usage/deepseek_v3.md.
@pytest.mark.parametrize(
    ("dtype", "gpu", "recommended"),
    [
        ("fp8", "H200", 8),
        ("fp8", "B200", 8),
        ("fp8", "MI300X", 8),
        ("fp8", "H100", 16),
        ("bf16", "H200", 16),
        ("int8", "A100-80", 16),
        ("int4", "H100", 8),
        ("int4", "A100-80", 8),
    ],
)
def test_the_smallest_layout_is_what_servers_recommend(dtype: Dtype, gpu: str, recommended: int) -> None:
    made = plan(PlanSettings("DeepSeek-R1", dtype=dtype, gpu=gpu))
    assert made.layouts[0].n_gpus == recommended


PAGE = Path(__file__).resolve().parents[3] / "docs" / "planning.md"


def as_documented(made: ServingPlan) -> dict[str, float]:
    """Work out every figure of a plan with the formulas of its page, in their order."""
    counts, shape, gpu, layout, given = made.counts, made.shape, made.gpu, made.layouts[0], made.settings
    latent, experts = shape.latent, shape.experts
    names: dict[str, Any] = dataclasses.asdict(counts) | dataclasses.asdict(given)
    names |= {"ceil": math.ceil, "floor": math.floor, "min": min, "max": max, "bits": BITS[made.dtype]}
    names |= {"layers": shape.n_layers, "heads": shape.n_heads, "kv_heads": shape.n_kv_heads}
    names |= {"head_dim": shape.head_dim, "kv_lora_rank": latent and latent.kv_rank, "cache_bits": given.cache_bits}
    if latent:
        names |= {"qk_rope_head_dim": latent.rope_dim, "qk_nope_head_dim": latent.nope_dim}
        names |= {"v_head_dim": latent.v_dim}
    names |= {"n_experts": experts.n if experts else 0, "n_active_experts": experts.n_active if experts else 0}
    names |= {"memory": gpu.memory * 1e9, "bandwidth": gpu.bandwidth * 1e9, "rate": made.tokens_per_s}
    names |= {"tp": layout.tp, "pp": layout.pp, "dp": layout.dp, "ep": layout.ep, "n_gpus": layout.n_gpus}
    assert given.price
    names |= {"price_in": given.price.prompt, "price_out": given.price.completion}
    for block in re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
        for line in block.splitlines():
            name, _, formula = line.partition(" = ")
            names[name] = eval(formula, {"__builtins__": {}}, names)
    return names


@pytest.mark.parametrize("model", [model.repo.partition("/")[2] for model in MODELS])
@pytest.mark.parametrize("n_gpus", [None, 16])
def test_every_figure_comes_of_the_documented_formula(model: str, n_gpus: int | None) -> None:
    made = plan(PlanSettings(model, gpu="H100", n_gpus=n_gpus, gpu_hour=2.5, price=Price(0.5, 2), concurrency=100))
    layout, formulas = made.layouts[0], as_documented(made)
    for name, figure in {
        "total": made.counts.total,
        "active": made.counts.active,
        "weight_bytes": made.weight_bytes[made.dtype],
        "expert_bytes": made.load.expert_bytes,
        "cache_bytes": made.load.cache_bytes,
        "plain_cache_bytes": made.plain_cache_bytes,
        "gpu_weight_bytes": layout.weight_bytes,
        "gpu_cache_bytes": layout.cache_bytes,
        "n_sequences": layout.n_sequences,
        "n_running": layout.n_running,
        "other_bytes": made.load.read_bytes,
        "read_bytes": layout.read_bytes,
        "tokens_per_s": layout.tokens_per_s,
        "hours": made.hours,
        "usd_rented": made.usd_rented,
        "usd_endpoint": made.usd_endpoint,
    }.items():
        assert formulas[name] == pytest.approx(figure, rel=1e-9), name


@settings(max_examples=60, deadline=None)
@given(
    config=st.sampled_from([model.config for model in MODELS]),
    dtype=st.sampled_from(list(BITS)),
    gpu=st.sampled_from(GPUS),
    prompt=st.integers(0, 5000),
    tokens=st.integers(1, 30_000),
    concurrency=st.integers(1, 2000),
)
def test_what_is_said_to_fit_fits(
    config: dict[str, Any], dtype: Dtype, gpu: Any, prompt: int, tokens: int, concurrency: int
) -> None:
    shape = read_shape(config, "test")
    load = Load.of(
        shape,
        count_parameters(shape),
        dtype=dtype,
        cache_bits=16,
        prompt_tokens=prompt,
        tokens=tokens,
        concurrency=concurrency,
    )
    for way in gpu_layouts(load, gpu):
        held_each = way.n_sequences / way.dp * way.cache_bytes * (prompt + tokens)
        assert way.weight_bytes + held_each <= USED_SHARE * gpu.memory * 1e9 * (1 + 1e-9)
        assert way.weight_bytes * way.n_gpus >= load.bytes * (1 - 1e-9), "the GPUs together hold all weights"
        assert shape.n_heads % way.tp == 0
        assert way.tp <= 8
        assert way.n_gpus <= 8 or way.n_gpus % 8 == 0
        assert way.ep == 1 or (shape.experts and shape.experts.n % way.ep == 0)
        assert way.n_running == min(way.n_sequences, concurrency)
        # No step of any layout reads more than its own memory, nor makes a token of a sequence twice.
        assert way.read_bytes <= gpu.memory * 1e9
        assert 0 < way.tokens_per_s <= way.n_running * gpu.bandwidth * 1e9 / (way.read_bytes * way.pp) * (1 + 1e-9)


def test_a_dense_model_alone_is_bound_by_its_weights() -> None:
    """One sequence on one GPU: bandwidth over the bytes of the model, as everybody works it out."""
    made = plan(PlanSettings("QwQ-32B", gpu="H100", dtype="fp8", tokens=1, prompt_tokens=0, concurrency=1, n_gpus=1))
    assert made.tokens_per_s == pytest.approx(3350e9 / made.load.read_bytes, rel=0.001)


def test_a_latent_cache_is_copied_to_every_tensor_parallel_gpu_and_kv_heads_are_cut() -> None:
    by_model = {name: plan(PlanSettings(name, gpu="H200", n_gpus=8)) for name in ("DeepSeek-R1", "QwQ-32B")}
    latent = next(way for way in by_model["DeepSeek-R1"].layouts if way.tp == 8)
    assert latent.cache_bytes == by_model["DeepSeek-R1"].load.cache_bytes
    cut = next(way for way in by_model["QwQ-32B"].layouts if way.tp == 8)
    assert cut.cache_bytes * 8 == by_model["QwQ-32B"].load.cache_bytes


@pytest.mark.parametrize(("heads", "kv_heads", "widest"), [(28, 4, 4), (40, 8, 8), (14, 2, 2), (24, 6, 2), (9, 3, 1)])
def test_tensor_parallel_divides_the_heads(heads: int, kv_heads: int, widest: int) -> None:
    """Qwen2.5-7B has 28 heads: servers refuse it on 8 GPUs of one tensor-parallel group."""
    config = TINY | {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "hidden_size": heads * 64}
    shape = read_shape(config | {"num_hidden_layers": 1}, "test")
    load = Load.of(
        shape, count_parameters(shape), dtype="bf16", cache_bits=16, prompt_tokens=1, tokens=1, concurrency=1
    )
    found = [n for n in (1, 2, 4, 8) if gpu_layouts(load, find_gpu("H100"), n)]
    assert max(found) == widest


def test_hours_and_dollars() -> None:
    made = plan(
        PlanSettings(traces=9000, tokens=4000, prompt_tokens=500, tokens_per_s=1000, gpu_hour=3, price=Price(0.5, 2))
    )
    assert not made.is_bound
    assert made.hours == pytest.approx(10)
    assert made.usd_rented == pytest.approx(10 * 8 * 3)
    assert made.usd_endpoint == pytest.approx(9000 * (500 * 0.5 + 4000 * 2) / 1e6)


def test_without_prices_there_are_no_dollars_and_the_hours_are_a_bound() -> None:
    made = plan(PlanSettings("Qwen3-30B-A3B"))
    assert made.is_bound
    assert (made.usd_rented, made.usd_endpoint) == (None, None)
    assert "at most, a bound" in text_of(made)
    assert "at least" in text_of(made)


def text_of(made: ServingPlan, width: int = 80) -> str:
    out = io.StringIO()
    print_plan(made, Console(file=out, width=width, no_color=True))
    return out.getvalue()


@pytest.mark.parametrize("model", [model.repo.partition("/")[2] for model in MODELS])
def test_it_prints_in_80_columns_and_names_its_page(model: str) -> None:
    made = plan(PlanSettings(model, gpu_hour=3, price=Price(0.55, 2.19)))
    text = text_of(made)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text, "nothing is cut off"
    assert "docs/planning.md" in text


def test_the_printed_figures_are_the_published_ones() -> None:
    text = " ".join(text_of(plan(PlanSettings("DeepSeek-R1"))).split())
    for figure in ("671.0 B, 36.6 B active", "8 of 256 active", "fp8 673.2 GB", "70.3 kB a token", "71.1 times"):
        assert figure in text


def test_the_json_is_whole() -> None:
    record = json.loads(json.dumps(plan_json(plan(PlanSettings(price=Price(1, 2))))))
    assert record["counts"]["total"] == 671_026_419_200
    assert record["layouts"][0]["n_gpus"] == 8
    assert record["elsewhere"]["H100"]["name"].startswith("DP 16")
    assert record["settings"]["price"] == {"prompt": 1, "completion": 2}


@pytest.mark.parametrize(
    "name", ["deepseek-v3", "DeepSeek-R1", "hf:deepseek-ai/DeepSeek-R1", "deepseek-ai/deepseek-r1"]
)
def test_models_by_any_spelling(name: str) -> None:
    assert plan(PlanSettings(name)).counts.total == 671_026_419_200


@pytest.mark.parametrize(
    ("name", "gpu"), [("h100", "H100"), ("RTX4090", "RTX 4090"), ("4090", "RTX 4090"), ("a100", "A100-80")]
)
def test_gpus_by_any_spelling(name: str, gpu: str) -> None:
    assert find_gpu(name).name == gpu


def test_a_config_of_ones_own(tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TINY))
    made = plan(PlanSettings(str(folder)))
    assert (made.model, made.counts.total) == ("my-model", counted_by_transformers(TINY))
    assert plan(PlanSettings(str(folder / "config.json"))).counts == made.counts
    (folder / "config.json").write_text(json.dumps({"model_type": "some_vlm", "text_config": TINY}))
    assert plan(PlanSettings(str(folder))).counts == made.counts
    (folder / "config.json").write_text(json.dumps(TINY | {"model_type": "new", "max_position_embeddings": 99}))
    notes = " ".join(plan(PlanSettings(str(folder))).notes)
    assert "not checked" in notes
    assert "context of 99" in notes


def test_notes_say_what_a_reader_would_trip_over() -> None:
    assert "does not compute in fp8" in " ".join(plan(PlanSettings(gpu="A100-80")).notes)
    assert "more than the bound" in " ".join(plan(PlanSettings(tokens_per_s=10**6)).notes)
    assert plan(PlanSettings()).notes == []


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
    ("fields", "code", "says"),
    [
        ({"teacher": "gpt-9"}, "no-such-model", "gpt-9"),
        ({"gpu": "H900"}, "no-such-gpu", "H900"),
        ({"dtype": "fp3"}, "no-such-choice", "fp3"),
        ({"traces": 0}, "number-out-of-range", "traces"),
        ({"tokens_per_s": -1.0}, "number-out-of-range", "tokens-per-s"),
        ({"gpu_hour": -1.0}, "number-out-of-range", "gpu-hour"),
        ({"n_gpus": 4}, "does-not-fit-gpus", "4 × H200"),
        ({"n_gpus": 9}, "does-not-fit-gpus", "9 × H200"),
        ({"gpu": "RTX 4090", "tokens": 3_000_000}, "does-not-fit-gpus", "RTX 4090"),
    ],
)
def test_what_cannot_be_planned_says_why_and_what_to_do(fields: dict[str, Any], code: str, says: str) -> None:
    with pytest.raises(UsageError) as error:
        plan(PlanSettings(**fields))
    assert error.value.code == code
    assert says in error.value.message
