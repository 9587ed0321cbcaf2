"""A plan as people and programs read it."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from deepdistill.distill.planning.catalogue import MODELS
from deepdistill.distill.planning.plan import PlanSettings, ServingPlan, plan
from deepdistill.distill.planning.text import plan_json, print_plan
from deepdistill.distill.recipe.gathering import Price


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


def test_a_bound_is_called_one() -> None:
    bound, measured = (text_of(plan(PlanSettings("Qwen3-30B-A3B", tokens_per_s=rate))) for rate in (None, 500))
    assert "at most, a bound" in bound
    assert "at least" in bound
    assert "as you measured" in measured
    assert "at least" not in measured
