"""Every recipe of examples/ runs, in small and offline: the pocket student, a few problems, worked solutions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from deepdistill.cli import main
from deepdistill.distill.problems.split import bucket_of

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted((ROOT / "examples").glob("*.toml"))


def row(recipe: str, number: int) -> dict[str, Any]:
    """Return a problem of the kind that a recipe is for, with a worked solution."""
    if recipe == "function_calling":
        call = json.dumps({"name": "double", "arguments": {"x": number}})
        question = f"You may call double(x). Reply with a JSON object only: double {number}, please."
        schema = {"type": "object", "required": ["name", "arguments"]}
        return {"question": question, "schema": schema, "answer": call, "worked": f"x is {number}.\n#### {call}"}
    question, answer = f"Tom has {number} apples and buys as many. How many?", str(2 * number)
    return {"question": question, "answer": f"{number}+{number}=<<{number}+{number}={answer}>>{answer}\n#### {answer}"}


def write_problems(path: Path, recipe: str) -> None:
    """Write ten problems that train and three that score."""
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "validation": [], "test": []}
    for number in range(3, 200):
        one = row(recipe, number)
        rows[bucket_of(one["question"])].append(one)
    path.write_text("".join(json.dumps(one) + "\n" for one in rows["train"][:10] + rows["test"][:3]))


def test_the_three_recipes_are_there() -> None:
    assert [path.stem for path in RECIPES] == ["function_calling", "gsm8k", "my_problems"]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_runs_in_small(recipe: Path, tmp_path: Path) -> None:
    problems, folder = tmp_path / "problems.jsonl", tmp_path / "run"
    write_problems(problems, recipe.stem)
    grader = {"function_calling": "?grader=json_schema", "gsm8k": "?grader=number"}.get(recipe.stem, "")
    argv = ["teach", "--config", str(recipe), "--problems", f"{problems}{grader}", "--student", "pocket"]
    argv += ["--teacher", "worked", "--samples", "1", "--n-traces", "6", "--epochs", "1", "--n-eval", "2"]
    argv += ["--set", "scores.max_tokens=8", "--out", str(folder)]
    assert main([*argv, "--offline", "--quiet"]) == 0
    curation = json.loads((folder / "curation.json").read_text())
    assert (curation["traces"], curation["kept"]) == (6, 6)
    assert set(json.loads((folder / "scores.json").read_text())) == {"base", "student"}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_says_its_command_and_its_result(recipe: Path) -> None:
    header = recipe.read_text(encoding="utf-8").split("\n\n")[0]
    assert f"deepdistill teach --config examples/{recipe.name}" in header
    assert "Expected result:" in header
