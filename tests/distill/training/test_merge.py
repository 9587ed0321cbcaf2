"""Merging an adapter into its base."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from deepdistill.distill.training import merge
from deepdistill.distill.training.merge import merge_adapter
from deepdistill.distill.training.rows import Row
from deepdistill.errors import ArtifactError

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers by an older name

Go = Callable[..., Any]
Rows = Callable[..., list[Row]]


def test_an_adapter_of_another_base_is_not_merged(go: Go, pocket_student: Path, tmp_path: Path) -> None:

    go(tmp_path, batch_size=8, steps=2)
    other = AutoModelForCausalLM.from_pretrained(pocket_student)
    other.get_input_embeddings().weight.data[3, 3] += 1
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ArtifactError, check=lambda error: error.code == "adapter-of-other-base"):
        merge_adapter(
            tmp_path / "adapter",
            tmp_path / "other",
            tokenizer=AutoTokenizer.from_pretrained(pocket_student),
            out=tmp_path / "m",
        )
    assert not (tmp_path / "m").exists()


def test_a_merge_that_is_cut_off_leaves_no_student_and_is_done_again(
    go: Go, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def die(*_: Any, **__: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(merge, "save_checkpoint", die)
        with pytest.raises(Killed):
            go(tmp_path, batch_size=8, steps=3)
    assert not (tmp_path / "s").exists()
    steps: list[float] = []
    report = go(tmp_path, progress=steps.append, batch_size=8, steps=3)
    assert (tmp_path / "s" / "model.safetensors").exists()
    assert report.steps == 3
    assert not steps  # nothing is trained twice
