"""A question that the student answers while it trains: its greedy answer, and never more than 2 % of the time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from deepdistill.distill.tokenizer import text_of
from deepdistill.distill.training.newest_answer import Question
from deepdistill.distill.training.objective import Objective
from deepdistill.distill.training.rows import Row, make_row
from deepdistill.distill.training.student import teach_template


class Time:
    """A clock of which every look takes a while."""

    def __init__(self, seconds: float, look: float = 0.0) -> None:
        self.seconds, self.look = seconds, look

    def __call__(self) -> float:
        self.seconds += self.look
        return self.seconds


@pytest.fixture
def tokenizer(pocket_student: Path) -> Any:
    found = AutoTokenizer.from_pretrained(pocket_student)
    teach_template(found)
    return found


@pytest.fixture
def model(pocket_student: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(pocket_student, dtype=torch.float32).eval()


@pytest.fixture
def row(tokenizer: Any) -> Row:
    return make_row(tokenizer, [{"role": "user", "content": "3 + 4 ="}], reasoning="3+4=7", content="7")


@pytest.mark.parametrize("prepare", [lambda model: None, lambda model: Objective(model, 64)], ids=["plain", "packed"])
def test_the_answer_is_the_students_likeliest(
    prepare: Callable[[Any], Any], model: Any, tokenizer: Any, row: Row
) -> None:
    prompt = torch.tensor([list(row.input_ids[: row.n_prompt])])
    n = 2 * row.n_targets
    expected = model.generate(prompt, max_new_tokens=n, do_sample=False, attention_mask=torch.ones_like(prompt))
    text = text_of(tokenizer, expected[0, row.n_prompt :].tolist())
    prepare(model)
    attention = model.config._attn_implementation
    now = Time(0.0)
    question = Question(model, row, tokenizer=tokenizer, now=now)
    assert question.ask() == ""  # no time has passed, so there is none to spend
    now.seconds = 1000.0
    asked = question.ask()
    assert asked.endswith(", right is 7")
    said = asked.removeprefix("says ").removesuffix(", right is 7").removeprefix("…").removesuffix("…")
    assert "".join(said.split()).replace("�", "")[:8] in "".join(text.split())
    assert model.config._attn_implementation == attention


def test_asking_keeps_to_its_share_of_the_time(model: Any, tokenizer: Any, row: Row) -> None:
    now = Time(0.0)
    question = Question(model, row, tokenizer=tokenizer, now=now)
    spent, seen = 0.0, set[str]()
    for _ in range(200):
        now.seconds, now.look = now.seconds + 1.0, 0.01  # a token takes that long
        before = now.seconds
        seen.add(question.ask().partition(" ")[0])
        spent += now.seconds - before
        now.look = 0.0
    assert seen == {"begins", "says"}
    assert spent <= 0.02 * now.seconds + 201 * 0.01  # asking the time takes time here, too


def test_a_model_that_cannot_answer_trains_on(model: Any, tokenizer: Any, row: Row) -> None:
    now = Time(0.0)
    question = Question(model, row, tokenizer=tokenizer, now=now)
    now.seconds = 1000.0
    calls = 0

    def broken(**_: Any) -> None:
        nonlocal calls
        calls += 1
        raise TypeError("no cache")

    model.get_decoder = lambda: broken
    assert [question.ask(), question.ask()] == ["", ""]
    assert calls == 1
