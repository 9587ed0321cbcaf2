from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from deepdistill.distill.recipe.gathering import CostRecipe
from deepdistill.distill.recipe.teach import TeachRecipe
from deepdistill.distill.recipe.training import TrainingRecipe
from deepdistill.distill.run import Run, find_run, run_name
from deepdistill.errors import ArtifactError
from deepdistill.localrun.core.append_file import AppendFile
from deepdistill.localrun.core.atomic import write_text
from deepdistill.localrun.core.settings import changed


def test_a_run_is_locked_against_another_process(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with Run(folder, TeachRecipe("p")):
        code = (
            "import sys; from pathlib import Path\n"
            "from deepdistill.distill.recipe.teach import TeachRecipe\n"
            "from deepdistill.distill.run import Run\nfrom deepdistill.errors import ArtifactError\n"
            "try:\n    Run(Path(sys.argv[1]), TeachRecipe('p')).__enter__()\n"
            "except ArtifactError as error:\n    print(error.message)\n"
        )
        other = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
        assert re.search(rf"process {os.getpid()} on .* since 20", other.stdout)
    with Run(folder, TeachRecipe("p")) as run:  # and free afterwards
        assert TeachRecipe.from_json(run.load("recipe.json")) == TeachRecipe("p")


def test_another_recipe_is_refused_and_nothing_is_overwritten(tmp_path: Path) -> None:
    recipe = TeachRecipe("p", seed=1)
    with Run(tmp_path / "run", recipe) as run:
        run.save("curation.json", {})
    with (
        pytest.raises(ArtifactError, check=lambda error: error.code == "run-differs") as caught,
        Run(tmp_path / "run", changed(recipe, {"seed": 5})),
    ):
        pass
    assert "seed was 1, is 5" in caught.value.message
    with Run(tmp_path / "run", recipe):  # the failed entry let the lock go
        pass


def test_limits_and_resources_belong_to_a_command(tmp_path: Path) -> None:
    with Run(tmp_path / "run", TeachRecipe("p")) as run:
        run.save("curation.json", {})
    other = changed(TeachRecipe("p"), {"resources.device": "cpu", "cost": CostRecipe(price=(1, 2), max_usd=3)})
    with Run(tmp_path / "run", other) as run:
        assert TeachRecipe.from_json(run.load("recipe.json")) == TeachRecipe("p")


def test_a_run_that_made_nothing_binds_nobody(tmp_path: Path) -> None:
    with Run(tmp_path / "run", TeachRecipe("typo")) as run:
        run.traces_path.touch()
        (run.folder / "failures.jsonl").write_text("{}\n")
    with Run(tmp_path / "run", TeachRecipe("right")) as run:
        assert run.load("recipe.json")["problems"] == "right"
        run.traces_path.write_text("{}\n")
    with (
        pytest.raises(ArtifactError, check=lambda error: error.code == "run-differs") as caught,
        Run(tmp_path / "run", TeachRecipe("other")),
    ):
        pass
    assert 'problems was "right"' in caught.value.message


def test_a_training_that_failed_before_its_first_checkpoint_may_be_tried_with_other_settings(tmp_path: Path) -> None:
    first, second, third = (TeachRecipe("p", training=TrainingRecipe(learning_rate=lr)) for lr in (1.0, 2.0, 3.0))
    with Run(tmp_path / "run", first) as run:
        run.traces_path.write_text("{}\n")
        run.checkpoints_dir.mkdir()
        (run.checkpoints_dir / "plan.json").write_text("{}")
        (run.checkpoints_dir / "checkpoint-3").mkdir()  # cut off while it was written
    with Run(tmp_path / "run", first):
        assert run.checkpoints_dir.exists()  # the same settings keep their plan
    with Run(tmp_path / "run", second) as run:
        assert not run.checkpoints_dir.exists()
        assert run.traces_path.exists()
        (run.checkpoints_dir / "checkpoint-3").mkdir(parents=True)
        (run.checkpoints_dir / "checkpoint-3" / "clock.json").touch()
    with (
        pytest.raises(ArtifactError, check=lambda error: error.code == "run-differs") as caught,
        Run(tmp_path / "run", third),
    ):
        pass
    assert "learning_rate was 2.0, is 3.0" in caught.value.message
    assert (tmp_path / "run" / "checkpoints" / "checkpoint-3").exists()
    assert "another folder" in caught.value.hint


def test_a_broken_artifact_is_named(tmp_path: Path) -> None:
    with Run(tmp_path / "run", TeachRecipe("p")) as run:
        (tmp_path / "run" / "scores.json").write_text('{"base": ')
        with pytest.raises(ArtifactError, check=lambda error: error.code == "artifact-broken") as caught:
            run.load("scores.json")
        assert "scores.json" in caught.value.message


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    with (
        pytest.raises(ArtifactError, check=lambda error: error.code == "out-is-file"),
        Run(tmp_path / "run", TeachRecipe("p")),
    ):
        pass
    assert (tmp_path / "run").read_text() == "mine"


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_text(path, "old")

    def full(self: Path, *_: object, **__: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(ArtifactError, check=lambda error: error.code == "write-failed"):
        write_text(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_names(tmp_path: Path) -> None:
    assert run_name("smollm2", "gym:chain_sum?min_terms=2") == "smollm2-chain_sum"
    assert run_name("hf:Qwen/Qwen3-0.6B", "some dir/my problems.jsonl") == "Qwen3-0.6B-my-problems"
    (tmp_path / "recipe.json").write_text("{}")
    assert find_run(tmp_path) == find_run(tmp_path / "student") == tmp_path
    assert find_run(tmp_path / "checkpoints") is None


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such permissions, and links need a privilege")
def test_a_run_is_private_and_follows_no_link(tmp_path: Path) -> None:
    folder, outside = tmp_path / "runs" / "run", tmp_path / "outside"
    outside.write_text("mine")
    with Run(folder, TeachRecipe("p")):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for target in (outside, tmp_path / "nowhere"):
        (folder / "scores.json").symlink_to(target)
        with pytest.raises(ArtifactError, check=lambda e: e.code == "run-has-link"), Run(folder, TeachRecipe("p")):
            pass
        (folder / "scores.json").unlink()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with (
        pytest.raises(ArtifactError, check=lambda e: e.code == "out-is-file"),
        Run(tmp_path / "dangling", TeachRecipe("p")),
    ):
        pass
    (tmp_path / "log").symlink_to(outside)
    with pytest.raises(ArtifactError, check=lambda e: e.code == "write-failed" and "link" in e.message):
        AppendFile(tmp_path / "log")
    assert outside.read_text() == "mine"
