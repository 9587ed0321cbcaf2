from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from deepdistill.distill.training.rows import Row, make_row, order_rows
from deepdistill.distill.training.student import teach_template
from deepdistill.errors import ModelError

MESSAGES = [{"role": "user", "content": "State the final answer: 4 + 3 ="}]


def test_trained_tokens_are_the_tokens_prompted_with_and_end_in_eos(pocket_student: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pocket_student)
    row = make_row(tokenizer, MESSAGES, reasoning="4+3=7", content="7")
    prompted = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    assert list(row.input_ids[: row.n_prompt]) == prompted
    assert tokenizer.decode(prompted).endswith("<|im_start|>assistant\n<think>\n")
    assert tokenizer.decode(row.input_ids[row.n_prompt :]) == "4+3=7\n</think>\n\n7<|im_end|>"
    assert row.input_ids[-1] == tokenizer.eos_token_id
    # What the template renders of the finished turn is the very same text.
    answer = {"role": "assistant", "content": "7", "reasoning_content": "4+3=7"}
    assert tokenizer.apply_chat_template([*MESSAGES, answer], tokenize=False).startswith(
        tokenizer.decode(row.input_ids)
    )


def test_earlier_thinking_leaves_the_history(pocket_student: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pocket_student)
    turns = [*MESSAGES, {"role": "assistant", "content": "7", "reasoning_content": "secret"}, *MESSAGES]
    assert "secret" not in tokenizer.apply_chat_template(turns, tokenize=False)


def test_a_template_that_breaks_the_seam_is_refused(pocket_student: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pocket_student)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}<think>{% endif %}"
    )
    with pytest.raises(ModelError, check=lambda error: error.code == "template-mismatch"):
        make_row(tokenizer, MESSAGES, reasoning="4+3=7", content="7")


def test_a_template_without_chatml_or_reasoning_is_refused(pocket_student: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pocket_student)
    tokenizer.chat_template = "{% for m in messages %}[INST]{{ m.content }}{% endfor %}"
    with pytest.raises(ModelError, check=lambda error: error.code == "template-without-reasoning"):
        teach_template(tokenizer)


def test_every_epoch_holds_every_row_and_batches_are_of_like_length() -> None:
    rows = [Row(list(range(n)), 1) for n in range(10, 110)]
    ordered = order_rows(rows, batch_size=8, epochs=2, seed=0)
    lengths = [len(row.input_ids) for row in ordered]
    assert sorted(lengths[:100]) == sorted(lengths[100:]) == list(range(10, 110))
    spread = [max(lengths[i : i + 8]) - min(lengths[i : i + 8]) for i in range(0, 48, 8)]
    assert max(spread[1:]) < 40  # of 100 in a random batch
    assert lengths[:8] == list(range(109, 101, -1))  # what does not fit the memory fails in the first step
    assert ordered == order_rows(rows, batch_size=8, epochs=2, seed=0)
    assert ordered != order_rows(rows, batch_size=8, epochs=2, seed=1)


def test_each_part_of_the_answer_has_its_weight(pocket_student: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pocket_student)
    plain = make_row(tokenizer, MESSAGES, reasoning="4+3=7", content="7")
    row = make_row(tokenizer, MESSAGES, reasoning="4+3=7", content="7", reasoning_weight=0.5, answer_weight=2.0)
    assert plain.weights is None
    assert row.weights is not None
    assert row.input_ids == plain.input_ids
    tokens = [tokenizer.decode([token]) for token in row.input_ids[row.n_prompt :]]
    heavy = "".join(token for token, weight in zip(tokens, row.weights, strict=True) if weight == 2.0)
    light = "".join(token for token, weight in zip(tokens, row.weights, strict=True) if weight == 0.5)
    assert (light, heavy) == ("4+3=7\n</think>\n\n", "7<|im_end|>")


def test_a_template_without_a_slot_for_reasoning_is_refused(pocket_student: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pocket_student)
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    with pytest.raises(ModelError, check=lambda error: error.code == "no-reasoning-slot"):
        make_row(tokenizer, MESSAGES, reasoning="4+3=7", content="7")
