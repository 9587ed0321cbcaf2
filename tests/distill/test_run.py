from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from deepdistill.distill.run import Run, find_run, run_name, write_text
from deepdistill.errors import ArtifactError


def test_a_run_is_locked_against_another_process(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with Run(folder, {"a": 1}):
        code = (
            "import sys; from pathlib import Path\n"
            "from deepdistill.distill.run import Run\nfrom deepdistill.errors import ArtifactError\n"
            "try:\n    Run(Path(sys.argv[1]), {'a': 1}).__enter__()\n"
            "except ArtifactError as error:\n    print(error.message)\n"
        )
        other = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
        assert re.search(rf"run is being written by process {os.getpid()} on .* since 20", other.stdout)
    with Run(folder, {"a": 1}) as run:  # and free afterwards
        assert run.load("recipe.json") == {"a": 1}


def test_another_recipe_is_refused_and_nothing_is_overwritten(tmp_path: Path) -> None:
    with Run(tmp_path / "run", {"seed": 1, "same": 2}) as run:
        run.save("curation.json", {})
    with pytest.raises(ArtifactError, match="seed was 1, is 5"), Run(tmp_path / "run", {"seed": 5, "same": 2}):
        pass
    with Run(tmp_path / "run", {"seed": 1, "same": 2}):  # the failed entry let the lock go
        pass


def test_a_run_that_made_nothing_binds_nobody(tmp_path: Path) -> None:
    with Run(tmp_path / "run", {"model": "typo"}) as run:
        run.traces_path.touch()
        (run.folder / "failures.jsonl").write_text("{}\n")
    with Run(tmp_path / "run", {"model": "right"}) as run:
        assert run.load("recipe.json") == {"model": "right"}
        run.traces_path.write_text("{}\n")
    with pytest.raises(ArtifactError, match="model was 'right'"), Run(tmp_path / "run", {"model": "other"}):
        pass


def test_a_training_that_failed_before_its_first_checkpoint_may_be_tried_with_other_settings(tmp_path: Path) -> None:
    with Run(tmp_path / "run", {"lr": 1, "teacher": "x"}, ["lr"]) as run:
        run.traces_path.write_text("{}\n")
        run.checkpoints_dir.mkdir()
        (run.checkpoints_dir / "plan.json").write_text("{}")
        (run.checkpoints_dir / "checkpoint-3").mkdir()  # cut off while it was written
    with Run(tmp_path / "run", {"lr": 1, "teacher": "x"}, ["lr"]):
        assert run.checkpoints_dir.exists()  # the same settings keep their plan
    with Run(tmp_path / "run", {"lr": 2, "teacher": "x"}, ["lr"]) as run:
        assert not run.checkpoints_dir.exists()
        assert run.traces_path.exists()
        (run.checkpoints_dir / "checkpoint-3").mkdir(parents=True)
        (run.checkpoints_dir / "checkpoint-3" / "clock.json").touch()
    with pytest.raises(ArtifactError, match="lr was 2, is 3") as caught, Run(tmp_path / "run", {"lr": 3}, ["lr"]):
        pass
    assert (tmp_path / "run" / "checkpoints" / "checkpoint-3").exists()
    assert "another folder" in caught.value.hint


def test_a_broken_artifact_is_named(tmp_path: Path) -> None:
    with Run(tmp_path / "run", {}) as run:
        (tmp_path / "run" / "scores.json").write_text('{"base": ')
        with pytest.raises(ArtifactError, match=r"scores\.json is broken"):
            run.load("scores.json")


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(ArtifactError, match="is a file"), Run(tmp_path / "run", {}):
        pass
    assert (tmp_path / "run").read_text() == "mine"


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_text(path, "old")

    def full(self: Path, *_: object, **__: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(ArtifactError, match="No space left"):
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
