"""The passes: each one has the loss and gradients of separate rows, and is taken only where it is exact."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from deepdistill.distill.recipe.training import LoraRecipe, TrainingRecipe
from deepdistill.distill.training.lora import load_student
from deepdistill.distill.training.objective import Objective
from deepdistill.distill.training.rows import Row
from deepdistill.errors import ModelError

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers by an older name

Go = Callable[..., Any]
Rows = Callable[..., list[Row]]


def test_a_sliding_window_narrower_than_the_rows_is_padded_and_exact(rows_of: Rows, tmp_path: Path) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = MistralForCausalLM(
        MistralConfig(vocab_size=200, num_key_value_heads=1, sliding_window=8, attn_implementation="sdpa", **sizes)
    )
    rows = rows_of(5)
    alone = torch.stack([_naive(model, row) for row in rows]).sum()
    objective = Objective(model, max(len(row.input_ids) for row in rows))
    assert objective.pass_ == "padded"
    assert model(**objective.collator(0)(rows)).item() == pytest.approx(alone.item(), rel=1e-4)
    objective.release()
    wide = Objective(model, 8)
    assert wide.pass_ != "padded"


def _naive(model: Any, row: Row) -> torch.Tensor:
    logits = model(torch.tensor([row.input_ids])).logits[0]
    targets = torch.tensor(row.input_ids[row.n_prompt :])
    return torch.nn.functional.cross_entropy(logits[row.n_prompt - 1 : -1], targets, reduction="sum")


@pytest.mark.parametrize("kind", ["deepseek", "dora", "full"])
def test_the_packed_pass_has_the_loss_and_gradients_of_separate_rows(kind: str, pocket_student: Path) -> None:
    from deepdistill.distill.teachers import pocket_dir

    base = pocket_dir() if kind == "deepseek" else pocket_student
    settings = TrainingRecipe(weights="lora" if kind == "dora" else "full", lora=LoraRecipe(dora=kind == "dora"))
    model = load_student(base, settings, device=torch.device("cpu"), dtype=torch.float32)
    rows = [Row([5, 6, 7, 8, 9], 2), Row([5, 6, 7, 10, 11, 12], 3), Row([20, 21], 1)]
    expected = torch.stack([_naive(model, row) for row in rows]).sum()
    expected.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    objective = Objective(model, 6)
    assert objective.pass_ == "packed"
    loss = model(**objective.collator(0)(rows))
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    for name, parameter in model.named_parameters():
        if name in wanted:
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-3, atol=2e-5, msg=name)


def test_attention_that_rows_cannot_have_is_found_out_and_padded(rows_of: Rows) -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=200, num_key_value_heads=1, head_dim=16, attn_logit_softcapping=0.05, sliding_window=64,
            final_logit_softcapping=2.0, attn_implementation="eager", **sizes,
        )
    )  # fmt: skip
    rows = rows_of(4)
    alone = torch.stack([_naive(model, row) for row in rows]).sum()
    objective = Objective(model, max(len(row.input_ids) for row in rows))
    assert objective.pass_ == "padded"  # attention scores are capped there
    assert model(**objective.collator(0)(rows)).item() == pytest.approx(alone.item(), rel=1e-4)


def test_attention_with_dropout_is_padded(pocket_student: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(pocket_student, attention_dropout=0.1)
    objective = Objective(model, 16)
    assert objective.pass_ == "padded"
    assert model.config._attn_implementation == "sdpa"


def test_logits_that_are_no_product_are_refused(pocket_student: Path) -> None:

    model = AutoModelForCausalLM.from_pretrained(pocket_student)
    plain = model.forward

    def twisted(*given: Any, **more: Any) -> Any:
        out = plain(*given, **more)
        out.logits = out.logits.square()
        return out

    model.forward = twisted
    with pytest.raises(ModelError, check=lambda error: error.code == "unknown-logits"):
        Objective(model, 16)


def test_a_student_of_experts_takes_the_packed_pass(go: Go, tmp_path: Path, pocket_student: Path) -> None:
    """Its layers have the names of Llama's, and what stands behind one of them is another thing."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "moe")
    AutoTokenizer.from_pretrained(pocket_student).save_pretrained(tmp_path / "moe")
    report = go(
        tmp_path, [Row(list(range(5, 20)), 3)] * 8, base=tmp_path / "moe", batch_size=4, epochs=1, weights="full"
    )
    assert report.pass_ == "packed"
