"""Calls come out of every form whole, and nothing that is no call is lost."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deepdistill.localrun.families.tool_calls import ToolCall, parse_tool_calls

relaxed = settings(deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])

# As the models write them; each says get_weather(city="Paris", days=2).
FORMS = {
    "hermes": '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "days": 2}}\n</tool_call>',
    "hermes, not closed": '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "days": 2}}',
    "smollm2": '<tool_call>[{"name": "get_weather", "arguments": {"city": "Paris", "days": 2}}]</tool_call>',
    "phi": '<|tool_call|>[{"name": "get_weather", "parameters": {"city": "Paris", "days": 2}}]<|/tool_call|>',
    "arguments as text": (
        '<tool_call>{"name": "get_weather", "arguments": "{\\"city\\": \\"Paris\\", \\"days\\": 2}"}</tool_call>'
    ),
    "openai": (
        '<tool_call>{"type": "function", "function": '
        '{"name": "get_weather", "arguments": {"city": "Paris", "days": 2}}}</tool_call>'
    ),
    "qwen3-coder": (
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n"
        "<parameter=days>\n2\n</parameter>\n</function>\n</tool_call>"
    ),
    "llama custom": '<function=get_weather>{"city": "Paris", "days": 2}</function>',
    "llama": '{"name": "get_weather", "parameters": {"city": "Paris", "days": 2}}',
    "llama typed": '{"type": "function", "name": "get_weather", "parameters": {"city": "Paris", "days": 2}}',
    "llama tag": '<|python_tag|>{"name": "get_weather", "parameters": {"city": "Paris", "days": 2}}',
    "llama python": '[get_weather(city="Paris", days=2)]',
    "lfm2": "<|tool_call_start|>[get_weather(city='Paris', days=2)]<|tool_call_end|>",
    "apriel": '<tool_calls>[{"name": "get_weather", "arguments": {"city": "Paris", "days": 2}}]</tool_calls>',
    "mistral": '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris", "days": 2}}]',
    "mistral small": '[TOOL_CALLS]get_weather[ARGS]{"city": "Paris", "days": 2}',
    "deepseek v3": (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
        '{"city": "Paris", "days": 2}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
    ),
    "deepseek v3.1": (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>"
        '{"city": "Paris", "days": 2}<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
    ),
    "gemma code": '```tool_code\nprint(get_weather(city="Paris", days=2))\n```',
    "gemma json": '```json\n{"name": "get_weather", "parameters": {"city": "Paris", "days": 2}}\n```',
}
WHOLE_TEXT = {"llama", "llama typed", "llama python"}  # these are calls only where nothing else is said


def read(call: ToolCall) -> tuple[str, Any]:
    return call["function"]["name"], json.loads(call["function"]["arguments"])


def called(content: str, known: list[str] | None = None) -> list[tuple[str, Any]]:
    return [read(call) for call in parse_tool_calls(content, known)[1]]


@pytest.mark.parametrize("form", FORMS)
def test_each_form_gives_openais(form: str) -> None:
    text, [call] = parse_tool_calls(FORMS[form])
    assert (text, read(call)) == ("", ("get_weather", {"city": "Paris", "days": 2}))
    assert set(call) == {"id", "type", "function"}
    assert call["type"] == "function"
    assert isinstance(call["function"]["arguments"], str)
    assert parse_tool_calls(FORMS[form], ["get_weather"])[0] == ""
    assert parse_tool_calls(FORMS[form], ["other"]) == (FORMS[form], [])


@pytest.mark.parametrize("form", FORMS.keys() - WHOLE_TEXT)
def test_text_around_a_call_is_kept(form: str) -> None:
    text, calls = parse_tool_calls(f"I look it up. é🦙\n{FORMS[form]}\nThen I answer.")
    assert text == "I look it up. é🦙\n\nThen I answer."
    assert len(calls) == 1


@pytest.mark.parametrize("form", FORMS)
def test_a_call_cut_short_stays_in_the_text(form: str) -> None:
    content = FORMS[form]
    end = max(content.rfind("2}"), content.rfind("2\n</"), content.rfind("2)"))
    for cut in range(1, end + 1):
        assert parse_tool_calls(content[:cut]) == (content[:cut], [])


def test_ids_are_unlike_each_other_and_short_for_mistral() -> None:
    """Mistral's templates refuse an id that is not nine characters long; one that the model wrote is kept."""
    _, calls = parse_tool_calls(FORMS["hermes"] * 50)
    assert len({call["id"] for call in calls}) == 50
    assert all(re.fullmatch(r"call_\w{24}", call["id"]) for call in calls)
    for form in ("mistral", "mistral small"):
        assert re.fullmatch(r"[a-z0-9]{9}", parse_tool_calls(FORMS[form])[1][0]["id"])
    for written in (
        '[TOOL_CALLS][{"name": "f", "arguments": {}, "id": "abcdef123"}]',
        "[TOOL_CALLS]f[CALL_ID]abcdef123[ARGS]{}",
    ):
        assert parse_tool_calls(written)[1][0]["id"] == "abcdef123"


@pytest.mark.parametrize(
    "content",
    [
        '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>\n<tool_call>{"name": "g"}</tool_call>',
        '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n{"name": "g", "arguments": {}}\n</tool_call>',
        '<|python_tag|>{"name": "f", "parameters": {"a": 1}}; {"name": "g", "parameters": {}}',
        '{"name": "f", "parameters": {"a": 1}};{"name": "g", "parameters": {}}',
        '[{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]',
        "[f(a=1), g()]",
        '[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]',
        '[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]g[ARGS]{}',
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{\"a\": 1}<｜tool▁call▁end｜>\n"
        "<｜tool▁call▁begin｜>g<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        "```tool_code\nf(a=1)\ng()\n```",
        "<function=f><parameter=a>1</parameter></function>\n<function=g></function>",
    ],
)  # fmt: skip
def test_more_than_one_call(content: str) -> None:
    assert called(content) == [("f", {"a": 1}), ("g", {})]
    assert parse_tool_calls(content)[0] == ""


@pytest.mark.parametrize(
    "content",
    [
        '{"name": "Ada", "age": 36}',  # an answer in JSON
        '```json\n{"name": "Ada"}\n```',
        '{"name": "f", "parameters": {}} is how I would call it.',
        "[1, 2, 3]",
        "[f(1)]",
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"a": 1e999}}</tool_call>',
        '<tool_call>{"name": "", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {}, }</tool_call>',
        "<tool_call>[]</tool_call>",
        "<tool_call><function=f><parameter=a>1</function></tool_call>",
        "<|python_tag|>print(1)",
        "[TOOL_CALLS] none",
        "```tool_code\nimport os\nos.remove(path='x')\n```",
        "```tool_code\nf(a=g())\n```",
        "```tool_code\nf(a={1, 2})\n```",
        "<tool_call>" + "[" * 100_000,
        "```tool_code\n" + "-" * 100_000 + "1",
        "```tool_code\n" + "f(a=" * 50 + ")" * 50,
        "  text with spaces  ",
    ],
)
def test_what_is_no_whole_call_is_text(content: str) -> None:
    assert parse_tool_calls(content) == (content, [])


def test_one_broken_call_does_not_hide_the_next() -> None:
    broken = '<tool_call>{"name": "f", "arguments": {"a": }}</tool_call>'
    text, calls = parse_tool_calls(f"{broken} {FORMS['hermes']}")
    assert text == broken
    assert [read(call)[0] for call in calls] == ["get_weather"]


def test_qwen3_coder_types_are_guessed_from_json() -> None:
    parameters = {
        "code": "\nif a < b:\n    pass",
        "n": "3",
        "on": "true",
        "of": '["x"]',
        "quoted": '"3"',
        "none": "null",
    }
    content = "".join(f"<parameter={name}>\n{value}\n</parameter>\n" for name, value in parameters.items())
    [(_, arguments)] = called(f"<tool_call>\n<function=f>\n{content}</function>\n</tool_call>")
    assert arguments == parameters | {"n": 3, "on": True, "of": ["x"], "none": None}


def test_lone_surrogates_and_raw_newlines_still_make_json() -> None:
    [(_, arguments)] = called('<tool_call>{"name": "f", "arguments": {"a": "\\ud800", "b": "x\ny"}}</tool_call>')
    assert arguments == {"a": "\ud800", "b": "x\ny"}
    _, [call] = parse_tool_calls('<tool_call>{"name": "f", "arguments": {"a": "\\ud800"}}</tool_call>')
    call["function"]["arguments"].encode()


SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)
)
ARGUMENTS = st.dictionaries(st.text(), VALUES, max_size=4)
NAMES = st.from_regex(r"[a-z_][a-z0-9_-]{0,12}", fullmatch=True)
PLAIN = st.text(st.sampled_from("ab é🦙.\n"), max_size=20)
WRAPPED = {
    "hermes": '<tool_call>\n{{"name": {name}, "arguments": {arguments}}}\n</tool_call>',
    "python_tag": '<|python_tag|>{{"name": {name}, "parameters": {arguments}}}',
    "mistral": '[TOOL_CALLS][{{"name": {name}, "arguments": {arguments}}}]',
    "mistral small": "[TOOL_CALLS]{bare}[ARGS]{arguments}",
    "deepseek": "<｜tool▁call▁begin｜>function<｜tool▁sep｜>{bare}\n```json\n{arguments}\n```<｜tool▁call▁end｜>",
    "function": "<function={bare}>{arguments}</function>",
    "gemma": '```json\n{{"name": {name}, "parameters": {arguments}}}\n```',
}


@relaxed
@given(st.sampled_from(sorted(WRAPPED)), NAMES, ARGUMENTS, PLAIN, PLAIN, st.booleans())
def test_round_trip(form: str, name: str, arguments: dict[str, Any], before: str, after: str, ascii: bool) -> None:
    written = WRAPPED[form].format(
        name=json.dumps(name), bare=name, arguments=json.dumps(arguments, ensure_ascii=ascii)
    )
    text, [call] = parse_tool_calls(f"{before}\n{written}\n{after}")
    assert read(call) == (name, arguments)
    assert text == f"{before}\n\n{after}".strip()


@relaxed
@given(NAMES.filter(str.isidentifier), st.dictionaries(NAMES.filter(str.isidentifier), VALUES, max_size=3))
def test_python_round_trip(name: str, arguments: dict[str, Any]) -> None:
    import keyword

    if keyword.iskeyword(name) or any(map(keyword.iskeyword, arguments)):
        return
    code = f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"
    expected = [(name, json.loads(json.dumps(arguments)))]
    assert called(f"[{code}]") == expected
    if "```" not in code:
        assert called(f"```tool_code\n{code}\n```") == expected


PIECES = [
    *FORMS.values(), "<tool_call>", "</tool_call>", "<function=", "f>", "<parameter=a>", "</parameter>", "[TOOL_CALLS]",
    "<|python_tag|>", "```json\n", "```tool_code\n", "```", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", '{"name": "f"',
    "{", "}", "[", "]", '"', "(", ")", ",", ";", "\\", "f(a=1)", "\n", " ", "é", "\0", "\ud800", "print(",
]  # fmt: skip


@relaxed
@given(st.text() | st.lists(st.sampled_from(PIECES), max_size=12).map("".join), st.none() | st.just(["f"]))
def test_any_text_is_read(content: str, known: list[str] | None) -> None:
    text, calls = parse_tool_calls(content, known)
    assert calls or text == content
    for call in calls:
        assert isinstance(read(call)[1], dict)
        assert known is None or call["function"]["name"] in known
