"""A run folder of version 0.1.0 is resumed, quantized and scored by this one; broken recipes are named, wholly."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from deepdistill.cli import main
from deepdistill.distill.recipe.teach import TeachRecipe
from deepdistill.distill.recipe.upgrade import VERSION, upgraded
from deepdistill.errors import ArtifactError
from deepdistill.localrun.core.settings import fields_of

OLD = Path(__file__).parent / "data" / "run-0.1.0"
COMMAND = [
    *("teach", "--problems", "gym:chain_sum?min_terms=2&max_terms=4&min_digits=1&max_digits=2"),
    *("--student", "tiny", "--weights", "full", "--n-traces", "24", "--n-eval", "8", "--lr", "0.003"),
    *("--max-tokens", "256", "--samples", "2", "--keep", "1", "--out", "run", "--quiet"),
    *("--set", "training.steps=4", "--set", "scores.max_tokens=48"),
    *("--set", "curation.similarity=none", "--set", "curation.accept=vote"),
]


@pytest.fixture
def old_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the run, beside the student that it names by a relative path."""
    shutil.copytree(OLD, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


def test_it_resumes_and_asks_for_nothing_again(old_run: Path) -> None:
    traces = (old_run / "traces.jsonl").read_bytes()
    weights = (old_run / "student" / "model.safetensors").read_bytes()
    assert main(COMMAND) == 0
    assert set(json.loads((old_run / "scores.json").read_text())) == {"base", "student"}
    assert (old_run / "traces.jsonl").read_bytes() == traces
    assert (old_run / "student" / "model.safetensors").read_bytes() == weights
    record = json.loads((old_run / "recipe.json").read_text())
    assert record["version"] == VERSION
    assert record["training"]["lora"]["rank"] == 32
    assert main(COMMAND) == 0, "the upgraded recipe is the same run's"


def test_it_trains_again_from_its_traces(old_run: Path) -> None:
    shutil.rmtree(old_run / "student")
    assert main([*COMMAND, "--stop-after", "training"]) == 0
    assert (old_run / "student" / "model.safetensors").exists()


def test_other_settings_are_refused(old_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COMMAND, "--seed", "1"]) == 1
    assert "seed was 0, is 1" in capsys.readouterr().err


def test_it_quantizes_and_is_scored(old_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", "run", "--quiet", "--no-fidelity", "--json"]) == 0
    made = Path(json.loads(capsys.readouterr().out.splitlines()[-1])["path"])
    assert made.stat().st_size > 10_000
    assert main(["eval", "run", "--n", "3", "--max-tokens", "16", "--quiet", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["n"] == 3


def test_every_setting_of_the_old_recipe_is_kept() -> None:
    recipe = TeachRecipe.of_run(OLD / "run")
    assert (recipe.teacher.model, recipe.teacher.max_tokens, recipe.traces.n, recipe.traces.samples) == (
        "pocket",
        256,
        24,
        2,
    )
    assert (recipe.curation.accept, recipe.curation.similarity, recipe.curation.keep) == (("vote",), None, 1)
    assert (recipe.training.weights, recipe.training.steps, recipe.training.learning_rate) == ("full", 4, 0.003)
    assert (recipe.scores.n, recipe.scores.max_tokens) == (8, 48)
    assert TeachRecipe.from_json(recipe.to_json()) == recipe


@pytest.mark.parametrize(
    ("old", "key", "value"),
    [
        ({"training": {"qlora": True}}, "training.weights", "qlora"),
        (
            {"training": {"lora_targets": "q_proj,v_proj", "lora_rank": 8}},
            "training.lora.targets",
            ("q_proj", "v_proj"),
        ),
        ({"training": {"report_to": ""}}, "training.report_to", ()),
        ({"curation": {"long_share": 0.0}}, "curation.long_share", 0.0),
        ({"rounds": 2, "round_problems": 9}, "on_policy.n_problems", 9),
        ({"judge": "http://j/v1", "judge_model": "strict", "judge_compare": True}, "judge.server_model", "strict"),
        ({"traces": "mine.jsonl"}, "traces.file", Path("mine.jsonl")),
        ({"method": "grpo"}, "training.method", "grpo"),
        ({"curriculum": True}, "training.curriculum.enabled", True),
    ],
)
def test_old_names_come_to_the_new_ones(old: dict[str, Any], key: str, value: Any) -> None:
    recipe: Any = TeachRecipe.from_json({"problems": "p", **old})
    for part in key.split("."):
        recipe = getattr(recipe, part)
    assert recipe == value


def test_unknown_keys_and_wrong_types_are_all_named() -> None:
    record = {"problems": "p", "training": {"lora_rnk": 8}, "samples": "four", "new_flag": 1}
    with pytest.raises(ArtifactError, check=lambda error: error.code == "recipe-broken") as caught:
        TeachRecipe.from_json(record)
    assert all(name in caught.value.message for name in ("training.lora_rnk", "traces.samples", "new_flag"))
    assert caught.value.hint


@pytest.mark.parametrize(
    ("record", "code"),
    [
        ([], "recipe-broken"),
        ("text", "recipe-broken"),
        ({"version": "1"}, "recipe-broken"),
        ({"version": -1}, "recipe-broken"),
        ({"version": True}, "recipe-broken"),
        ({"version": VERSION + 1}, "recipe-newer"),
    ],
)
def test_what_is_no_recipe_of_ours_is_said(record: Any, code: str) -> None:
    with pytest.raises(ArtifactError, check=lambda error: error.code == code):
        upgraded(record)


def test_recipe_json_holds_no_limits_and_no_device() -> None:
    kept = TeachRecipe("p").to_json()
    assert "cost" not in kept
    assert "resources" not in kept
    assert {leaf.path[0] for leaf in fields_of(TeachRecipe)} - set(kept) == {"cost", "resources"}
