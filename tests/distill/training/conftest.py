"""A training of the pocket student in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from deepdistill.distill.recipe.training import TrainingRecipe
from deepdistill.distill.training.rows import Row, order_rows
from deepdistill.distill.training.train import TrainPaths, TrainReport, train
from deepdistill.localrun.core.reporter import SILENT, Reporter

Go = Callable[..., TrainReport]


class Relay(Reporter):
    """Hands the share that is done to a function."""

    def __init__(self, progress: Callable[[float], None]) -> None:
        self._progress = progress

    def progress(self, stage: str, done: float, *, total: float, note: str = "") -> None:
        self._progress(done)


@pytest.fixture
def relay() -> type[Relay]:
    return Relay


def rows_of(n: int = 48) -> list[Row]:
    """Return rows of 12 to 16 tokens, drawn at random from the same seed."""
    generator = torch.Generator().manual_seed(0)
    return [Row(torch.randint(5, 200, (12 + i % 5,), generator=generator).tolist(), 4) for i in range(n)]


@pytest.fixture(name="rows_of")
def make_rows() -> Callable[..., list[Row]]:
    return rows_of


@pytest.fixture
def go(pocket_student: Path) -> Go:
    """Train into a folder: checkpoints in `c`, the student in `s`; further keywords are settings."""

    def run(
        out: Path,
        rows: Sequence[Row] | None = None,
        *,
        base: Path = pocket_student,
        progress: Callable[[float], None] | None = None,
        report: Reporter = SILENT,
        validation: Sequence[Row] = (),
        **options: Any,
    ) -> TrainReport:
        settings = TrainingRecipe(**({"dtype": "fp32", "threads": 1, "learning_rate": 3e-3} | options))
        ordered = order_rows(
            rows_of() if rows is None else rows, settings.batch_size, epochs=settings.epochs, seed=settings.seed or 0
        )
        if progress is not None:
            report = Relay(progress)
        return train(
            TrainPaths(base, out / "c", out / "s"),
            ordered,
            tokenizer=AutoTokenizer.from_pretrained(base),
            settings=settings,
            validation=validation,
            report=report,
        )

    return run
