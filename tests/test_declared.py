"""Settings as a person gives them: flags, `--set`, files and `deepdistill recipe`, all of them checked alike."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from deepdistill.cli import app, main
from deepdistill.commands.declared import settings_of
from deepdistill.commands.recipe import TREES
from deepdistill.distill.recipe.teach import TeachRecipe
from deepdistill.errors import UsageError
from deepdistill.localrun.core.settings import build

SUMS = "gym:chain_sum?min_terms=2&max_terms=2&min_digits=1&max_digits=1"


FIRST_FLAGS = (  # of `teach` in version 0.1.0
    "--problems --teacher --student --out --n-traces --n-eval --temperature --top-p --max-tokens",
    "--samples --keep --expand --accept --vote-share --judge --judge-model --judge-compare --rubric",
    "--curate --pass-samples --logprobs --price --judge-price --max-usd --max-hours --dry-run",
    "--eval-max-tokens --model --traces --method --loss --logit-share --curriculum --rounds",
    "--round-problems --round-samples --on-policy-loss --full --lora-rank --lora-alpha --lora-first-layer",
    "--lora-targets --lora-plus --dora --rslora --qlora --lr --train-batch-size --micro-batch --epochs",
    "--steps --minutes --max-length --too-long --reasoning-weight --answer-weight --n-validation",
    "--patience --train-dtype --threads --report-to --stop-after --concurrency --batch-size --device",
    "--timeout --max-rpm --max-tpm --seed --json --offline --quiet",
)


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """Return what a dry run of `teach` prints as JSON."""
    assert main(["teach", "--student", "pocket", "--dry-run", "--json", *arguments]) == 0
    record: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return record


def test_flags_win_over_the_file_and_the_file_over_the_defaults(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "recipe.toml"
    config.write_text(f'problems = "{SUMS}"\n[traces]\nn = 12\n[scores]\nn = 7\n')
    assert (planned(capsys, "--config", str(config)) | {"usd": 0})["n_problems"] == 12
    assert planned(capsys, "--config", str(config), "--n-traces", "5")["n_problems"] == 5
    made = planned(capsys, "--config", str(config), "--set", "traces.n=6")
    assert (made["n_problems"], made["n_held_out"]) == (6, 7)


def given(flags: dict[str, Any] | None = None, *assignments: str, config: Path | None = None) -> TeachRecipe:
    paths = {tuple(key.split(".")): value for key, value in (flags or {}).items()}
    recipe: TeachRecipe = settings_of(TeachRecipe, config=config, assignments=assignments, flags=paths)
    return recipe


def by_flag(key: str, value: Any, tmp_path: Path) -> TeachRecipe:
    return given({"problems": "p", key: value})


def by_assignment(key: str, value: Any, tmp_path: Path) -> TeachRecipe:
    return given({"problems": "p"}, f"{key}={value}")


def by_file(key: str, value: Any, tmp_path: Path) -> TeachRecipe:
    path = tmp_path / "recipe.toml"
    path.write_text(f'problems = "p"\n{key} = {json.dumps(value)}\n')
    return given(config=path)


@pytest.mark.parametrize("way", [by_flag, by_assignment, by_file])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("training.epochs", 0),
        ("training.weights", "all"),
        ("training.learning_rate", -1.0),
        ("cost.price", "5"),
        ("curation.accept", "me"),
        ("training.lora.rank", 0),
    ],
)
def test_a_value_is_refused_whichever_way_it_comes(
    way: Callable[..., TeachRecipe], key: str, value: Any, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, check=lambda error: error.code == "bad-settings") as caught:
        way(key, value, tmp_path)
    assert key in caught.value.message


@pytest.mark.parametrize("way", [by_flag, by_assignment, by_file])
def test_a_value_is_taken_whichever_way_it_comes(way: Callable[..., TeachRecipe], tmp_path: Path) -> None:
    assert way("training.epochs", 7, tmp_path).training.epochs == 7
    assert way("cost.price", "0.5,2", tmp_path).cost.price == (0.5, 2.0)
    assert way("curation.accept", "vote,judge", tmp_path).curation.accept == ("vote", "judge")


def test_a_flag_and_an_assignment_that_differ_are_refused() -> None:
    with pytest.raises(UsageError, check=lambda error: error.code == "set-twice"):
        given({"problems": "p", "training.epochs": 3}, "training.epochs=4")
    assert given({"problems": "p", "training.epochs": 3}, "training.epochs=3").training.epochs == 3


def test_faults_of_a_file_are_said_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("[training]\nepcohs = 3\nminutes = 'ten'\n")
    with pytest.raises(UsageError, check=lambda error: error.code == "bad-settings") as caught:
        given({"problems": "p"}, config=path)
    assert all(part in caught.value.message for part in (str(path), "training.epcohs", "training.minutes"))


@pytest.mark.parametrize(
    ("content", "code"), [(b"a = = 1", "config-broken"), (b"\xff\xfe", "config-broken"), (None, "config-unreadable")]
)
def test_what_is_no_toml_is_said(tmp_path: Path, content: bytes | None, code: str) -> None:
    path = tmp_path / "recipe.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, check=lambda error: error.code == code):
        given({"problems": "p"}, config=path)


@pytest.mark.parametrize(
    ("flag", "now"),
    [
        ("--lora-rank", "--set training.lora.rank=32"),
        ("--lora-rank=8", "--set training.lora.rank=32"),
        ("--full", "--weights full"),
        ("--curate", "--set curation.FILTER=VALUE"),
        ("--judge-compare", "leave it out"),
        ("--expand", "--set traces.expand.n="),
        ("--curriculum", "--set training.curriculum.enabled=true"),
        ("--eval-max-tokens", "--set scores.max_tokens=512"),
        ("--batch-size", "--set resources.batch_size=VALUE"),
    ],
)
def test_a_flag_that_is_gone_says_what_it_is_now(flag: str, now: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["teach", "--problems", SUMS, flag, "8"]) == 2
    error = capsys.readouterr().err
    assert flag.partition("=")[0] in error
    assert now in error


def test_every_flag_of_the_first_version_is_known_or_says_what_it_is_now() -> None:
    first = " ".join(FIRST_FLAGS).split()
    command = typer.main.get_command(app).commands["teach"]  # type: ignore[attr-defined]
    offered = {name for param in command.params for name in param.opts}
    assert [flag for flag in first if flag not in offered and flag not in command.gone] == []
    assert not offered & set(command.gone)


@pytest.mark.parametrize("name", sorted(TREES))
def test_the_printed_recipe_is_read_again(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", name]) == 0
    values = tomllib.loads(capsys.readouterr().out)
    required = {"problems": "p"} if name == "teach" else {}
    assert build(TREES[name], required | values) == build(TREES[name], required)


def test_the_recipe_of_a_run_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", str(Path(__file__).parent / "data" / "run-0.1.0" / "run")]) == 0
    values = tomllib.loads(capsys.readouterr().out)
    assert (values["student"], values["traces"]["samples"], values["training"]["weights"]) == ("tiny", 2, "full")
    assert values["curation"]["similarity"] == "none"
    assert main(["recipe", "nowhere"]) == 2


def test_help_has_headings_in_the_order_of_need(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["teach", "--help"]) == 0
    text = capsys.readouterr().out
    headings = ["Problems and student:", "Teacher and traces:", "Requests to a server:", "Cost:", "Training:"]
    places = [text.index(heading) for heading in headings]
    assert places == sorted(places)
    assert text.index("Training:") < text.index("Running:")
    assert text.count("\n  --") <= 38


def test_completion_is_on_and_loads_nothing_heavy() -> None:
    code = (
        "import os, sys\n"
        "os.environ |= {'_DEEPDISTILL_COMPLETE': 'complete_bash', 'COMP_WORDS': 'deepdistill te', 'COMP_CWORD': '1'}\n"
        "from deepdistill.cli import app\n"
        "try:\n    app(args=[], prog_name='deepdistill')\nexcept SystemExit: pass\n"
        "print({'torch', 'numpy', 'llama_cpp', 'rich'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[0] == "teach"
    assert done.stdout.splitlines()[-1] == "set()"
