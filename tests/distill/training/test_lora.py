"""Adapters: learning rates, and what a student has to bring."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from deepdistill.distill.recipe.training import LoraRecipe, TrainingRecipe
from deepdistill.distill.training.lora import load_student, parameter_groups
from deepdistill.distill.training.rows import Row
from deepdistill.errors import ModelError

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers by an older name

Go = Callable[..., Any]
Rows = Callable[..., list[Row]]


def test_lora_plus_gives_b_another_learning_rate(pocket_student: Path, tmp_path: Path) -> None:

    settings = TrainingRecipe(lora=LoraRecipe(plus=16.0), learning_rate=0.001)
    model = load_student(pocket_student, settings, device=torch.device("cpu"), dtype=torch.float32)
    groups = parameter_groups(model, settings)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {group["lr"]: {names[id(p)].split(".")[-3] for p in group["params"]} for group in groups}
    assert rates == {1e-3: {"lora_A"}, 16e-3: {"lora_B"}}


def test_a_tokenizer_that_knows_more_than_the_student_embeds_is_said(
    go: Go, pocket_student: Path, tmp_path: Path
) -> None:
    n = AutoModelForCausalLM.from_pretrained(pocket_student).get_input_embeddings().num_embeddings
    with pytest.raises(ModelError, check=lambda error: error.code == "token-not-embedded") as caught:
        go(tmp_path, [Row([5, 6, n], 1)] * 4)
    assert str(n) in caught.value.message


def test_qlora_without_a_gpu_is_said(go: Go, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ModelError, check=lambda error: error.code == "needs-gpu"):
        go(tmp_path, weights="qlora")
