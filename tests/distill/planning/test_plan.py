"""Every figure of a plan against the formulas of its page, and what cannot be planned."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from tiny_config import TINY, counted_by_transformers

from deepdistill.distill.planning.catalogue import MODELS
from deepdistill.distill.planning.parameters import (
    BITS,
)
from deepdistill.distill.planning.plan import PlanSettings, ServingPlan, find_gpu, plan
from deepdistill.distill.recipe.gathering import Price
from deepdistill.errors import UsageError

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
