"""What transformers' Trainer is told, and what it makes of a checkpoint that somebody else wrote."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from deepdistill.distill.recipe.training import TrainingRecipe
from deepdistill.distill.records import CURVE_FILE, CurvePoint
from deepdistill.distill.teachers.huggingface.loading import load_tokenizer
from deepdistill.distill.training.merge import merge_adapter
from deepdistill.distill.training.rows import Row
from deepdistill.distill.training.student import student_dir
from deepdistill.distill.training.trainer import arguments
from deepdistill.errors import ArtifactError, UsageError
from deepdistill.localrun.core.record_log import read_records

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers by an older name

Go = Callable[..., Any]
Rows = Callable[..., list[Row]]


def curve_of(folder: Path) -> list[CurvePoint]:
    return list(read_records(folder / CURVE_FILE, CurvePoint))


def losses_of(folder: Path) -> list[float]:
    return [point.loss for point in curve_of(folder) if point.loss is not None]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_gets_the_loss(go: Go, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    go(tmp_path, batch_size=8, steps=3, report_to=("tensorboard",))
    (events,) = (tmp_path / "c").rglob("events.out.tfevents.*")
    accumulated = EventAccumulator(str(events.parent))
    accumulated.Reload()
    losses = losses_of(tmp_path)
    assert [event.value for event in accumulated.Scalars("train/loss")] == pytest.approx(losses, rel=1e-3)


def test_a_tracker_shows_the_name_of_the_run_folder(tmp_path: Path) -> None:
    options: dict[str, Any] = {"device": torch.device("cpu"), "micro_batch": 8, "autocast": False, "n_rows": 8}
    given = arguments(TrainingRecipe(batch_size=8), tmp_path / "sums" / "checkpoints", **options)
    assert (given.project, given.run_name) == ("deepdistill", "sums")


def test_a_reporter_that_is_not_installed_is_said(go: Go, tmp_path: Path) -> None:
    with pytest.raises(UsageError, check=lambda error: error.code == "no-such-tracker"):
        go(tmp_path, batch_size=8, steps=1, report_to=("nobody",))
    with pytest.raises(UsageError, check=lambda error: error.code == "not-installed"):
        go(tmp_path, batch_size=8, steps=1, report_to=("neptune",))


class Planted:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


def cut_off(go: Go, folder: Path, rows: list[Row], **settings: Any) -> Path:
    """Train half of the steps and return the checkpoint that is left."""

    class Killed(BaseException):
        pass

    def die(done: float) -> None:
        if done >= 0.5:
            raise Killed

    with pytest.raises(Killed):
        go(folder, rows, progress=die, **settings)
    return max((folder / "c").glob("checkpoint-*"), key=lambda path: path.stat().st_mtime)


@pytest.mark.parametrize(
    ("weights", "name"),
    [
        ("lora", "optimizer.pt"),
        ("lora", "scheduler.pt"),
        ("lora", "rng_state.pth"),
        ("lora", "scaler.pt"),
        ("lora", "adapter_model.bin"),
        ("full", "pytorch_model.bin"),
    ],
)
def test_a_planted_pickle_in_a_checkpoint_ends_the_resume_and_runs_nothing(
    weights: str, name: str, go: Go, rows_of: Rows, tmp_path: Path
) -> None:
    settings = {"batch_size": 8, "steps": 4, "save_every_s": 0, "weights": weights}
    checkpoint = cut_off(go, tmp_path / "run", rows_of(16), **settings)
    for other in checkpoint.glob("*.safetensors") if name.endswith("model.bin") else ():
        other.unlink()
    whole = (checkpoint / name).read_bytes() if (checkpoint / name).exists() else None
    torch.save({"state": Planted(tmp_path / "ran")}, checkpoint / name)
    with pytest.raises(ArtifactError, check=lambda error: error.code == "checkpoint-broken") as caught:
        go(tmp_path / "run", rows_of(16), **settings)
    assert str(checkpoint) in caught.value.message
    assert "\n" not in caught.value.message
    assert not (tmp_path / "ran").exists()
    if whole and name == "optimizer.pt":  # and one that was cut off is said alike
        (checkpoint / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ArtifactError, check=lambda error: error.code == "checkpoint-broken"):
            go(tmp_path / "run", rows_of(16), **settings)
        shutil.rmtree(checkpoint)
        assert go(tmp_path / "run", rows_of(16), **settings).steps == 4, "what the hint says helps"


def test_a_planted_pickle_that_nothing_reads_stays_unread(go: Go, rows_of: Rows, tmp_path: Path) -> None:
    settings = {"batch_size": 8, "steps": 4, "save_every_s": 0}
    checkpoint = cut_off(go, tmp_path / "run", rows_of(16), **settings)
    for name in ("training_args.bin", "pytorch_model.bin.index.json", "optimizer.bin"):
        torch.save(Planted(tmp_path / "ran"), checkpoint / name)
    assert go(tmp_path / "run", rows_of(16), **settings).steps == 4
    (adapter,) = (tmp_path / "run" / "adapter").glob("*.safetensors")
    adapter.unlink()
    torch.save({"weight": Planted(tmp_path / "ran")}, adapter.with_suffix(".bin"))
    shutil.rmtree(tmp_path / "run" / "s")
    with pytest.raises(ArtifactError, check=lambda error: error.code == "adapter-broken"):
        merge_adapter(
            tmp_path / "run" / "adapter",
            student_dir("pocket"),
            tokenizer=load_tokenizer(student_dir("pocket")),
            out=tmp_path / "run" / "s",
        )
    assert not (tmp_path / "ran").exists()
