"""Rendered prompts equal those of transformers, whatever the template uses."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from deepdistill.errors import ModelError
from deepdistill.localrun.core.generation import Message
from deepdistill.localrun.engine.engine import Engine
from deepdistill.localrun.families import template
from deepdistill.localrun.families.template import render

ROOT = Path(__file__).resolve().parents[3]
OURS = (ROOT / "distill" / "pocket" / "chat_template.jinja").read_text(encoding="utf-8")

# What published templates use beyond ChatML: helpers, filters, loop controls, the assistant's span, undefined names.
ELABORATE = """\
{%- if tools is not none %}tools{% endif %}
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'note' %}{% continue %}{% endif %}
    {%- if message.role == 'assistant' %}
        {%- set text = message.content.split('</think>')[-1].strip() %}
        {%- generation %}{{ text + eos_token }}{% endgeneration %}
    {%- else %}
        {{- '[' ~ message.role ~ ']' ~ message | tojson }}
    {%- endif %}
{%- endfor %}
{%- if documents %}{{ documents }}{% endif %}
{%- if add_generation_prompt %}{{ '<think>' if enable_thinking | default(true) else 'now: ' }}{% endif %}
"""

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
ONE: list[Message] = [{"role": "user", "content": "what is 3 + 4? <é🦙>"}]
LONG: list[Message] = [
    {"role": "system", "content": 'Be "brief" & don\'t lie.'},
    {"role": "user", "content": "  one\n\n"},
    {"role": "assistant", "content": "1", "reasoning_content": "first\nthen"},
    {"role": "user", "content": "two"},
]
ASKED_TO_GO_ON: list[Message] = [*LONG, {"role": "assistant", "content": "2", "reasoning_content": "so"}]


@pytest.fixture(scope="module")
def smollm2_template(smollm2_gguf: Path) -> str:
    with Engine(smollm2_gguf, n_ctx=256) as engine:
        return engine.metadata["tokenizer.chat_template"]


@cache
def peer() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"<s>": 0, "</s>": 1}, unk_token="<s>")), bos_token="<s>", eos_token="</s>"
    )


def by_transformers(source: str, messages: list[Any], thinking: bool, tools: list[Any] | None = None) -> str:
    rendered: str = peer().apply_chat_template(
        messages,
        chat_template=source,
        tools=tools,
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=thinking,
    )
    return rendered


@pytest.mark.parametrize("messages", [ONE, LONG, ASKED_TO_GO_ON], ids=["one", "long", "answered"])
@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("name", ["ours", "smollm2", "elaborate"])
def test_equals_transformers(name: str, thinking: bool, messages: list[Message], smollm2_template: str) -> None:
    source = {"ours": OURS, "smollm2": smollm2_template, "elaborate": ELABORATE}[name]
    assert render(source, messages, thinking=thinking, variables=SPECIAL) == by_transformers(source, messages, thinking)


TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "What the weather <é> will be.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
# The two ways in which published templates write a call: most want an object, some a text.
WITH_TOOLS = """\
{%- for tool in tools or [] %}{{ tool.function.name }}: {{ tool | tojson(indent=4) }}
{% endfor %}
{%- for message in messages %}
    {{- '[' ~ message.role ~ ']' ~ (message.content or '') }}
    {%- for call in message.tool_calls or [] %}CALL{% endfor %}
{%- endfor %}"""
OBJECT = (
    "{%- set f = call.function %}{{ f.name }}({{ f.arguments | tojson }} {% for k in f.arguments %}{{ k }}{% endfor %})"
)
TEXT = "{{ call.function.name + '(' + call.function.arguments + ')' ~ call.function.arguments }}"


def calling(arguments: Any) -> list[dict[str, Any]]:
    call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": arguments}}
    return [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]


@pytest.mark.parametrize(("form", "wants"), [(OBJECT, dict), (TEXT, str)])
def test_tools_and_calls_equal_transformers(form: str, wants: type) -> None:
    """OpenAI's messages hold arguments as text; here a template gets what it wants, transformers what it is given."""
    source = WITH_TOOLS.replace("CALL", form)
    arguments = {"city": "Zürich", "days": 2}
    text = json.dumps(arguments, ensure_ascii=False)
    expected = by_transformers(source, calling(text if wants is str else arguments), True, TOOLS)
    assert "Zürich" in expected
    for given in (arguments, text):
        messages = calling(given)
        assert render(source, messages, thinking=True, variables=SPECIAL, tools=TOOLS) == expected
        assert messages == calling(given)


def test_arguments_that_are_no_json_are_shown_as_they_are() -> None:
    source = WITH_TOOLS.replace("CALL", "{{ call.function.arguments }}")
    assert "{broken" in render(source, calling("{broken"), thinking=True)


def test_no_tools_are_none_to_the_template() -> None:
    source = "{{ 'none' if tools is none else 'some' }}"
    assert render(source, ONE, thinking=True) == render(source, ONE, thinking=True, tools=[]) == "none"


def test_thinking_has_gpt_osss_name_too() -> None:
    source = "{% for m in messages %}{{ m.thinking or '' }}|{% endfor %}"
    assert render(source, LONG, thinking=True) == by_transformers(source, LONG, True) == "||first\nthen||"


def test_ours_opens_thinking_or_closes_it_at_once() -> None:
    assert render(OURS, ONE, thinking=True).endswith("<|im_start|>assistant\n<think>\n")
    assert render(OURS, ONE, thinking=False).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_earlier_thinking_is_dropped_by_ours() -> None:
    assert "first\nthen" not in render(OURS, LONG, thinking=True)


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{% for m in messages %}",
        "{{ messages[0].content + 1 }}",
        "{{ nothing.at.all }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
    ],
)
def test_a_template_that_refuses_or_is_broken_is_one_error(source: str) -> None:
    with pytest.raises(ModelError, check=lambda error: error.code == "template-refused"):
        render(source, ONE, thinking=True)


def test_a_file_without_template_is_told(tmp_path: Path, build_gguf: Any) -> None:
    with (
        Engine(build_gguf(tmp_path / "bare.gguf", template=None), n_threads=1) as engine,
        pytest.raises(ModelError, check=lambda error: error.code == "no-chat-template"),
    ):
        engine.render(ONE)


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{{ 'x' * 9999 }}{% endfor %}",
        "{{ 'x' * 99999999999 }}",
        "{{ ['x'] * 99999999999 }}",
        "{{ '%099999999999d' % 1 }}",
        "{{ 9 ** 999999999 }}",
        "{{ 'x'.zfill(99999999999) }}",
        "{% set x = namespace(y='x') %}{% for a in range(50) %}{% set x.y = x.y ~ x.y %}{% endfor %}",
        "{% set x = namespace(y='x') %}{% for a in range(50) %}{% set x.y = x.y + x.y %}{% endfor %}",
    ],
)
def test_what_a_template_writes_is_bounded(source: str) -> None:
    with pytest.raises(ModelError, check=lambda error: error.code == "template-refused"):
        render(source, [], thinking=True)


def test_a_template_without_end_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template, "MAX_SECONDS", 0.2)
    source = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(ModelError, check=lambda error: error.code == "template-refused"):
        render(source, [], thinking=True)
    assert render("{{ 2 * 3 }}{{ 'ab' * 2 }}", [], thinking=True) == "6abab"
