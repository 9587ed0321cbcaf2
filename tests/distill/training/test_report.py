"""Settings that do not go together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from deepdistill.distill.recipe.training import LoraRecipe, TrainingRecipe
from deepdistill.distill.training.rows import Row
from deepdistill.errors import UsageError

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers by an older name

Go = Callable[..., Any]
Rows = Callable[..., list[Row]]


def test_settings_that_do_not_go_together_are_said() -> None:
    with pytest.raises(UsageError, check=lambda error: error.code == "settings-conflict"):
        TrainingRecipe(weights="full", lora=LoraRecipe(dora=True))
    with pytest.raises(UsageError, check=lambda error: error.code == "settings-conflict"):
        TrainingRecipe(reasoning_weight=0, answer_weight=0)
