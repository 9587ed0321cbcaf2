"""Training and teachers render a chat template as transformers does, and end one that would never come to an end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from deepdistill.cli import main
from deepdistill.distill.teachers.huggingface.loading import load_tokenizer
from deepdistill.distill.tokenizer import prompt_of
from deepdistill.errors import ModelError
from deepdistill.localrun.families import template

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "content": "2", "reasoning_content": "one and one"},
]
ODD = """\
{%- if enable_thinking is defined %}switched{% endif %}{{ pad_token }}|{{ eos_token }}
{%- for m in messages %}<{{ m.role ~ ':' ~ m.content | trim }}>{{ m.reasoning_content + '.' if m.reasoning_content }}
{% endfor %}{% if add_generation_prompt %}now{% endif %}"""
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
HUGE = "{% for a in range(99999) %}{{ 'x' * 9999 }}{% endfor %}"


@pytest.mark.parametrize("source", [None, ODD])
@pytest.mark.parametrize("asks", [True, False])
def test_a_conversation_is_rendered_as_transformers_does(source: str | None, asks: bool, pocket_student: Path) -> None:
    tokenizer = load_tokenizer(pocket_student)
    tokenizer.chat_template = source or tokenizer.chat_template
    expected = tokenizer.apply_chat_template(TALK, add_generation_prompt=asks, tokenize=False)
    assert prompt_of(tokenizer, TALK, asks=asks) == expected
    assert "1 + 1?" in expected


@pytest.mark.parametrize("source", [ENDLESS, HUGE])
@pytest.mark.parametrize("argv", [["--student", "{model}"], ["--student", "pocket", "--teacher", "{model}"]])
def test_a_template_without_end_is_one_line_before_anything_is_trained(
    source: str,
    argv: list[str],
    pocket_student: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(template, "MAX_SECONDS", 0.3)
    folder = shutil.copytree(pocket_student, tmp_path / "model")
    (folder / "chat_template.jinja").write_text(source + "{# reasoning_content #}")
    words = ["teach", "--problems", "gym:chain_sum", "--n-traces", "2", "--out", str(tmp_path / "run"), "--json"]
    assert main(words + [word.format(model=folder) for word in argv]) == 1
    printed, said = capsys.readouterr()
    assert json.loads(printed.splitlines()[-1])["error"]["code"] == "template-refused"
    assert "Traceback" not in said


def test_a_model_without_template_is_told(pocket_student: Path) -> None:
    tokenizer = load_tokenizer(pocket_student)
    tokenizer.chat_template = None
    with pytest.raises(ModelError, check=lambda error: error.code == "no-chat-template"):
        prompt_of(tokenizer, TALK)
