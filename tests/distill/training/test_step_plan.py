"""What a training measures at its start and keeps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from deepdistill.distill.recipe.training import TrainingRecipe
from deepdistill.distill.training.rows import Row
from deepdistill.distill.training.step_plan import make_plan
from deepdistill.distill.training.trainer import arguments

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers by an older name

Go = Callable[..., Any]
Rows = Callable[..., list[Row]]


def test_a_run_keeps_what_it_measured_at_its_start(go: Go, tmp_path: Path) -> None:
    measured = {"batch_size": 8, "dtype": None, "threads": None}
    first = go(tmp_path, steps=2, **measured)
    plan = json.loads((tmp_path / "c" / "plan.json").read_text())
    assert plan == {"dtype": first.dtype, "threads": first.threads, "micro_batch": first.micro_batch}
    (tmp_path / "c" / "plan.json").write_text(json.dumps(plan | {"threads": 3}))
    assert go(tmp_path, steps=4, **measured).threads == 3


@pytest.mark.parametrize(("batch_size", "micro_batch", "at_once"), [(4, 3, 2), (4, 32, 4), (5, 3, 1), (6, 4, 3)])
def test_a_step_is_as_many_rows_as_asked_whatever_is_computed_at_once(
    pocket_student: Path, tmp_path: Path, rows_of: Rows, batch_size: int, micro_batch: int, at_once: int
) -> None:
    settings = TrainingRecipe(batch_size=batch_size, micro_batch=micro_batch, dtype="fp32", threads=1)
    cpu = torch.device("cpu")
    plan = make_plan(pocket_student, rows_of(8), settings=settings, device=cpu, folder=tmp_path)
    options: dict[str, Any] = {"device": cpu, "micro_batch": plan.micro_batch, "autocast": False, "n_rows": 8}
    given = arguments(settings, tmp_path, **options)
    assert (given.per_device_train_batch_size, given.gradient_accumulation_steps) == (at_once, batch_size // at_once)
