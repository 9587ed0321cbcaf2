"""What transformers' Trainer is told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from deepdistill.distill.recipe.training import TrainingRecipe
from deepdistill.distill.records import CURVE_FILE, CurvePoint
from deepdistill.distill.training.rows import Row
from deepdistill.distill.training.trainer import arguments
from deepdistill.errors import UsageError
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
