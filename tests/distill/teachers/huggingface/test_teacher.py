"""The teacher as a whole: contexts, thinking, and what cannot be opened."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import ask

from deepdistill.distill.teachers import Request, open_teacher
from deepdistill.distill.teachers.huggingface.teacher import TransformersTeacher
from deepdistill.errors import ModelError, UsageError
from deepdistill.localrun.core.generation import Sampling


def test_closing_the_iterator_stops_and_the_teacher_answers_again(llama: TransformersTeacher) -> None:
    answers = llama.generate(ask(9), Sampling(max_tokens=24))
    next(answers)
    answers.close()  # type: ignore[attr-defined]
    assert len(list(llama.generate(ask(9), Sampling(max_tokens=24)))) == 9
    assert list(llama.generate([], Sampling())) == []


def test_the_context_bounds_prompt_and_answer(llama: TransformersTeacher) -> None:
    long = [{"role": "user", "content": "12 " * 200}]
    answers = dict(llama.generate([Request(long), *ask(2)], Sampling(max_tokens=500)))
    assert answers[0].finish_reason == "error"
    assert "context of 96" in (answers[0].error or "")
    for i in (1, 2):
        assert answers[i].prompt_tokens + answers[i].completion_tokens <= 96


def test_thinking_is_told_from_the_answer(llama: TransformersTeacher, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "12+30=42\n</think>\n\n42<|im_end|>"
    wanted = llama.tokenizer(text, add_special_tokens=False).input_ids
    monkeypatch.setattr(llama, "eos_ids", frozenset([wanted[-1]]))
    monkeypatch.setattr(llama, "model", Parrot(llama.model, wanted))
    ((_, answer),) = llama.generate(ask(1), Sampling(max_tokens=64))
    assert (answer.reasoning_content, answer.content, answer.closed) == ("12+30=42", "42", True)
    close = llama.tokenizer.convert_tokens_to_ids("</think>")
    assert answer.reasoning_tokens == wanted.index(close) + 1
    assert (answer.completion_tokens, answer.finish_reason) == (len(wanted), "stop")
    ((_, cut),) = llama.generate(ask(1), Sampling(max_tokens=4))
    assert (cut.content, cut.closed, cut.finish_reason, cut.reasoning_tokens) == ("", False, "length", 4)


class Parrot(torch.nn.Module):
    """A model that says what it was told, whatever it is asked."""

    def __init__(self, model: Any, tokens: list[int]) -> None:
        super().__init__()
        self.config, self.device, self.tokens, self.n = model.config, model.device, tokens, 0

    def forward(self, input_ids: torch.Tensor, past_key_values: Any, **_: Any) -> Any:
        rows, width = input_ids.shape
        states = torch.zeros(rows, 1, width, 1)
        for i in range(len(past_key_values.layers)):
            past_key_values.update(states, states, i)
        self.n = 0 if width > 1 else self.n + 1
        logits = torch.nn.functional.one_hot(torch.tensor([[self.tokens[self.n]]] * rows), self.config.vocab_size)
        return type("Output", (), {"logits": logits.float()})


def test_a_template_that_takes_no_system_turn_gets_it_in_the_first_one(
    llama: TransformersTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + plain
    monkeypatch.setattr(llama.tokenizer, "chat_template", refusing)
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"}]
    assert llama.render(asked) == "<user>Be brief.\n\n1 + 1?"
    with pytest.raises(ModelError, check=lambda error: error.code == "template-refused"):
        llama.render(asked[:1])


def test_a_model_without_chat_template(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["llama"], tmp_path / "plain")
    (folder / "chat_template.jinja").unlink()
    with open_teacher(str(folder), device="cpu") as teacher, pytest.raises(ModelError) as caught:
        list(teacher.generate(ask(1), Sampling()))
    assert caught.value.code == "no-chat-template"


@pytest.mark.parametrize("spec", ["no/such/folder", "pockett", "ftp://host/v1", ""])
def test_unknown_specs(spec: str) -> None:
    with pytest.raises(UsageError) as caught:
        open_teacher(spec)
    assert "pocket" in caught.value.hint


def test_what_is_not_there() -> None:
    with pytest.raises(ModelError, check=lambda error: error.code == "no-such-model"):
        open_teacher("none.gguf")
    with pytest.raises(ModelError, check=lambda error: error.code == "no-such-model"):
        open_teacher("hf:deepdistill-tests/none", offline=True)
    with pytest.raises(UsageError, check=lambda error: error.code == "offline"):
        open_teacher("https://example.org/v1", offline=True)


def test_options_that_cannot_be(folders: dict[str, Path]) -> None:
    for options in ({"batch_size": 0}, {"device": "abacus"}):
        with pytest.raises(UsageError):
            TransformersTeacher(folders["llama"], **options)  # type: ignore[arg-type]
