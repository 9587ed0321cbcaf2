"""The course of a training: time, curve, validation, checkpoints, and when it ends."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from deepdistill.distill.recipe.training import TrainingRecipe
from deepdistill.distill.records import CURVE_FILE, CurvePoint
from deepdistill.distill.training import train as train_module
from deepdistill.distill.training.callback import Clock, cut_curve
from deepdistill.distill.training.rows import Row
from deepdistill.distill.training.trainer import schedule
from deepdistill.errors import ModelError
from deepdistill.localrun.core.record_log import read_records

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers by an older name

Go = Callable[..., Any]
Rows = Callable[..., list[Row]]


def curve_of(folder: Path) -> list[CurvePoint]:
    return list(read_records(folder / CURVE_FILE, CurvePoint))


def losses_of(folder: Path) -> list[float]:
    return [point.loss for point in curve_of(folder) if point.loss is not None]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder).state_dict())


def test_minutes_box_the_time_and_shape_the_schedule(rows_of: Rows) -> None:
    settings, times = TrainingRecipe(minutes=1.0, warmup=0.1, final_lr=0.05), iter((0, 0, 3, 6, 33, 60, 90))
    clock = Clock(settings, rows_of(4), now=lambda: next(times))
    rate = schedule(settings, lambda step: clock.progress(step / 1000))
    assert [round(rate(0), 3) for _ in range(6)] == [0.01, 0.5, 1.0, 0.525, 0.05, 0.05]


def test_a_checkpoint_remembers_the_time_it_took(go: Go, rows_of: Rows, tmp_path: Path) -> None:
    go(tmp_path, rows_of(8), weights="full", epochs=1, batch_size=4, save_every_s=0)
    checkpoint = max((tmp_path / "c").glob("checkpoint-*"))
    assert json.loads((checkpoint / "clock.json").read_text())["seconds"] > 0


def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_last_good_checkpoint(
    go: Go, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learning: list[Any] = []
    real = train_module.load_student

    def load(*given: Any, **options: Any) -> Any:
        model = real(*given, **options)
        learning.extend(p for p in model.parameters() if p.requires_grad)
        return model

    def poison(done: float) -> None:
        for parameter in learning if done >= 0.5 else []:
            parameter.data.fill_(float("nan"))

    monkeypatch.setattr(train_module, "load_student", load)
    with pytest.raises(ModelError, check=lambda error: error.code == "loss-not-finite") as caught:
        go(tmp_path, progress=poison, batch_size=8, steps=6, save_every_s=0.0)
    assert str(tmp_path / "c" / "checkpoint-3") in caught.value.message
    assert not (tmp_path / "s").exists()


def test_a_diverging_loss_ends_the_run(go: Go, tmp_path: Path) -> None:
    with pytest.raises(ModelError, check=lambda error: error.code == "loss-diverged"):
        go(tmp_path, weights="full", batch_size=2, epochs=20, learning_rate=3.0, warmup=0.5)


def test_training_ends_early_where_held_out_rows_get_no_better(go: Go, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(9)
    held_out = [Row(torch.randint(5, 60, (14,), generator=generator).tolist(), 4) for _ in range(8)]  # of another kind
    report = go(tmp_path, batch_size=4, epochs=30, learning_rate=1e-2, patience=2, weights="full", validation=held_out)
    curve = curve_of(tmp_path)
    losses = [point.validation_loss for point in curve if point.validation_loss is not None]
    assert report.stopped == "early"
    assert report.steps < 360
    assert min(losses[-2:]) >= min(losses[:-2])
    assert report.validation_loss == pytest.approx(min(losses), abs=1e-3)
    best = next(after.step for point, after in pairwise(curve) if point.validation_loss == min(losses))
    wanted = load_file(tmp_path / "c" / f"checkpoint-{best}" / "model.safetensors")
    assert best < report.steps
    found = weights(tmp_path / "s")
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    assert report.validation_accuracy is not None


def test_validation_is_the_loss_and_accuracy_of_the_held_out_targets(go: Go, rows_of: Rows, tmp_path: Path) -> None:
    held_out = rows_of(6)
    report = go(tmp_path, batch_size=8, epochs=1, weights="full", validation=held_out)
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "s", dtype=torch.float32)
    logprobs, right = [], []
    for row in held_out:
        logits = student(torch.tensor([row.input_ids])).logits[0].log_softmax(-1).detach()
        for i in range(row.n_prompt, len(row.input_ids)):
            logprobs.append(float(logits[i - 1, row.input_ids[i]]))
            right.append(int(logits[i - 1].argmax()) == row.input_ids[i])
    assert report.validation_loss == pytest.approx(-sum(logprobs) / len(logprobs), rel=1e-3)
    assert report.validation_accuracy == pytest.approx(sum(right) / len(right), abs=0.02)


def test_the_curve_has_every_step(go: Go, tmp_path: Path) -> None:
    report = go(tmp_path, batch_size=8, epochs=2)
    points = curve_of(tmp_path)
    assert [point.step for point in points] == list(range(1, report.steps + 1))
    rates = [point.lr for point in points if point.lr is not None]
    assert rates[-1] < rates[3]
    assert all(point.tokens_per_s is not None and point.tokens_per_s > 0 for point in points)


def test_a_curve_is_cut_at_the_checkpoint_that_a_run_resumes_from(tmp_path: Path) -> None:
    path = tmp_path / CURVE_FILE
    old = '{"step": 1, "loss": 3.0}\n{"validation_loss": 2.5}\n{"step": 2, "loss": NaN}\n{"validation_loss": 2.6}\n'
    path.write_text(old + '{"step": 3, "lo')  # a version before, and as a kill leaves it
    cut_curve(path, 1)
    assert curve_of(tmp_path) == [CurvePoint(1, loss=3.0), CurvePoint(validation_loss=2.5)]
    cut_curve(path, 0)
    assert curve_of(tmp_path) == []


def test_the_note_has_the_loss_the_held_out_rows_and_an_answer(
    go: Go, rows_of: Rows, tmp_path: Path, recorder: Any
) -> None:
    rows = rows_of(64)
    go(tmp_path, rows[:48], weights="full", epochs=12, batch_size=4, validation=rows[48:], report=recorder)
    note = recorder.steps[-1][3]
    assert re.match(r"step \d+, loss [▁-▇]{12,24} \d+\.\d\d, held out \d+ %, ", note)
    assert note.endswith("tokens/s")
    checkpoint = max((tmp_path / "c").glob("checkpoint-*"), key=lambda path: path.stat().st_mtime)
    kept = json.loads((checkpoint / "clock.json").read_text())["validations"]
    assert {len(found) for _, found in kept} == {3}
