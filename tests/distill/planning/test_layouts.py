"""Layouts on GPUs: what fits, and what servers recommend."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_config import TINY

from deepdistill.distill.planning.catalogue import GPUS, MODELS
from deepdistill.distill.planning.layouts import USED_SHARE, gpu_layouts
from deepdistill.distill.planning.parameters import (
    BITS,
    Dtype,
    count_parameters,
    read_shape,
)
from deepdistill.distill.planning.plan import PlanSettings, find_gpu, load_of, plan


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
    wanted = PlanSettings(prompt_tokens=prompt, tokens=tokens, concurrency=concurrency)
    load = load_of(shape, count_parameters(shape), dtype=dtype, settings=wanted)
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
    wanted = PlanSettings(prompt_tokens=1, tokens=1, concurrency=1)
    load = load_of(shape, count_parameters(shape), dtype="bf16", settings=wanted)
    found = [n for n in (1, 2, 4, 8) if gpu_layouts(load, find_gpu("H100"), n)]
    assert max(found) == widest
