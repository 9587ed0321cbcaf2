"""Training and asking on a GPU, against the same on the CPU: `pytest -m gpu`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from deepdistill.distill.problems.load import load_problems
from deepdistill.distill.recipe.training import TrainingRecipe
from deepdistill.distill.records import CURVE_FILE, CurvePoint, messages_of
from deepdistill.distill.teachers import Request, open_teacher
from deepdistill.distill.training.losses import LOSSES, Head, Segment, Targets, projected_loss
from deepdistill.distill.training.rows import Row, order_rows
from deepdistill.distill.training.train import TrainPaths, train
from deepdistill.localrun.core.generation import Sampling
from deepdistill.localrun.core.record_log import read_records

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]


def _rows(n: int) -> list[Row]:
    generator = torch.Generator().manual_seed(0)
    return [Row(torch.randint(5, 200, (12 + i % 9,), generator=generator).tolist(), 4) for i in range(n)]


def test_the_projected_loss_and_its_gradient_are_those_of_the_cpu() -> None:
    torch.manual_seed(0)
    n, width, vocabulary = 700, 24, 500
    hidden, projection = torch.randn(n, width), torch.randn(vocabulary, width)
    targets = Targets(torch.randint(vocabulary, (n,)), torch.rand(n))
    found = []
    for device in ("cpu", "cuda"):
        states = hidden.clone().to(device).requires_grad_()
        segments = [Segment(0, n, (("cross_entropy", 1.0),))]
        loss = projected_loss(
            states,
            Head(projection.to(device)),
            targets=targets.to(device),
            segments=segments,
            losses=LOSSES,
            chunk_bytes=4 * 64 * vocabulary,
        )
        loss.backward()
        assert states.grad is not None
        found.append((loss.detach().cpu(), states.grad.cpu()))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("full", [False, True])
def test_a_training_comes_to_the_loss_of_the_cpus(full: bool, pocket_student: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pocket_student)
    settings = TrainingRecipe(
        weights=full, epochs=20, batch_size=8, learning_rate=0.001 if full else 0.005, dtype="fp32"
    )
    reports = []
    for device in ("cpu", "cuda"):
        folder = tmp_path / device
        paths = TrainPaths(pocket_student, folder / "c", folder / "s")
        rows = order_rows(_rows(16), settings.batch_size, epochs=settings.epochs, seed=0)
        report = train(paths, rows, tokenizer=tokenizer, settings=settings, device=device)
        reports.append(report)
        AutoModelForCausalLM.from_pretrained(folder / "s")
    assert reports[0].pass_ == reports[1].pass_
    assert reports[1].steps == reports[0].steps
    if not full:
        assert reports[1].merge_error is not None
        assert reports[1].merge_error < 1e-3
    curves = [_losses(tmp_path / device / CURVE_FILE) for device in ("cpu", "cuda")]
    last = max(curves[1])  # a GPU's curve has a point every ten steps, their mean
    mean = sum(curves[0][step] for step in range(last - 9, last + 1)) / 10
    assert curves[1][last] == pytest.approx(mean, rel=0.02)


def _losses(path: Path) -> dict[int, float]:
    return {point.step: point.loss for point in read_records(path, CurvePoint) if point.loss is not None}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_pocket_teacher_answers_as_on_the_cpu(temperature: float, chain_sum: str) -> None:
    problems = load_problems(chain_sum, n=24)
    answers = []
    for device in ("cpu", "cuda"):
        teacher = open_teacher("pocket", device=device)
        requests = [Request(messages_of(problem), seed=i) for i, problem in enumerate(problems)]
        sampling = Sampling(temperature=temperature, max_tokens=64)
        answers.append({i: done.content for i, done in teacher.generate(requests, sampling)})
        teacher.close()
    same = sum(answers[0][i] == answers[1][i] for i in answers[0])
    assert same >= 22  # a tie may fall the other way
