from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from deepdistill.distill.rows import IGNORED, Row, collate, make_row, order_rows
from deepdistill.distill.student import teach_template
from deepdistill.errors import ModelError

MESSAGES = [{"role": "user", "content": "State the final answer: 4 + 3 ="}]


def test_trained_tokens_are_the_tokens_prompted_with_and_end_in_eos(pocket_student: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pocket_student)
    row = make_row(tokenizer, MESSAGES, "4+3=7", "7")
    prompted = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    assert row.input_ids[: row.n_prompt] == prompted
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
    with pytest.raises(ModelError, match="differently"):
        make_row(tokenizer, MESSAGES, "4+3=7", "7")


def test_a_template_without_chatml_or_reasoning_is_refused(pocket_student: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pocket_student)
    tokenizer.chat_template = "{% for m in messages %}[INST]{{ m.content }}{% endfor %}"
    with pytest.raises(ModelError, match="neither renders reasoning"):
        teach_template(tokenizer)


def test_labels_are_the_next_tokens_of_the_answer_only() -> None:
    batch = collate([Row([5, 6, 7, 8], 2), Row([5, 6, 9], 2)], pad_token_id=0)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [5, 6, 9, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 7, 8, IGNORED], [IGNORED, 9, IGNORED, IGNORED]]


def test_every_epoch_holds_every_row_and_batches_are_of_like_length() -> None:
    rows = [Row(list(range(n)), 1) for n in range(10, 110)]
    ordered = order_rows(rows, batch_size=8, epochs=2, seed=0)
    lengths = [len(row.input_ids) for row in ordered]
    assert sorted(lengths[:100]) == sorted(lengths[100:]) == list(range(10, 110))
    spread = [max(lengths[i : i + 8]) - min(lengths[i : i + 8]) for i in range(0, 48, 8)]
    assert max(spread) < 40  # of 100 in a random batch
    assert ordered == order_rows(rows, batch_size=8, epochs=2, seed=0)
    assert ordered != order_rows(rows, batch_size=8, epochs=2, seed=1)
