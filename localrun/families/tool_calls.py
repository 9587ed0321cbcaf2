"""Find the tool calls in what a model wrote, and give them OpenAI's form.

Every family of open models writes calls in its own way. A form here is an opener, which hardly occurs in text by
chance, and a reader of what follows it. A call that its reader cannot read completely stays in the text: it is shown,
never dropped. Left out on purpose: gpt-oss's channels, GLM's and Kimi's forms.
"""

from __future__ import annotations

import ast
import json
import re
import secrets
import warnings
from collections.abc import Callable, Collection
from typing import Any, Literal, NoReturn, TypedDict

from ...errors import UsageError

_TOOLS_HINT = 'a list of {"type": "function", "function": {"name": …, "description": …, "parameters": JSON schema}}'


class Function(TypedDict):
    """The function that is called; `arguments` is the text of a JSON object."""

    name: str
    arguments: str


class ToolCall(TypedDict):
    """One call in the form of OpenAI's chat completions."""

    id: str
    type: Literal["function"]
    function: Function


def read_tools(text: str) -> tuple[dict[str, Any], ...]:
    """Return the tools of a JSON text in OpenAI's form; bare functions, and a single tool, are accepted too.

    Raises:
        UsageError: code "tools-broken".
    """
    try:
        given = json.loads(text)
    except ValueError as error:
        raise _broken(f"the tools are not JSON: {error}") from error
    tools = []
    for item in given if isinstance(given, list) else [given]:
        function = item.get("function", item) if isinstance(item, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise _broken("a tool has no name")
        tools.append({"type": "function", "function": {"description": "", "parameters": {}} | function})
    if not tools:
        raise _broken("the list of tools is empty")
    return tuple(tools)


def _broken(message: str) -> UsageError:
    return UsageError(message, _TOOLS_HINT, code="tools-broken")


def parse_tool_calls(content: str, known: Collection[str] | None = None) -> tuple[str, list[ToolCall]]:
    """Return (the text without its calls, the calls in order); a text without a call comes back unchanged.

    The forms are those of Hermes, Qwen and SmolLM (`<tool_call>`, with JSON or Qwen3-Coder's XML), Llama 3
    (`<|python_tag|>`, bare JSON, `<function=NAME>`, `[f(a=1)]`), LFM2 (`<|tool_call_start|>`), Mistral
    (`[TOOL_CALLS]`), DeepSeek (`<｜tool▁call▁begin｜>`) and Gemma (a fence with `tool_code` or JSON). Given `known`,
    the names of the tools that were offered, a call of anything else is text.
    """
    calls: list[ToolCall] = []
    kept: list[str] = []
    start = at = 0
    while opener := _OPENER.search(content, at):
        try:
            found, end = _FORMS[str(opener.lastgroup)][1](content, opener)
            if known is not None and any(call["function"]["name"] not in known for call in found):
                raise ValueError("a tool that was not offered")
        except (ValueError, SyntaxError, RecursionError, MemoryError):  # the last three are those of Python's parser
            at = max(opener.end(), at + 1)  # a bare object has an empty opener
        else:
            calls += found
            kept.append(content[start : opener.start()])
            start = at = end
    kept.append(content[start:])
    return ("".join(kept).strip() if calls else content), calls


_Found = tuple[list[ToolCall], int]  # at least one call, and where the text continues


def _read_xml(text: str, opener: re.Match[str]) -> _Found:
    """Read Qwen3-Coder's parameters, or Llama 3.1's JSON.

    Qwen3-Coder writes no types: what reads as JSON, but not as a JSON string, is JSON; all else is text.
    """
    end = _skip(r"\s*", text, opener.end())
    arguments: Any = {}
    if text.startswith("{", end):
        arguments, end = _DECODER.raw_decode(text, end)
    while parameter := _PARAMETER.match(text, end):
        arguments[parameter[1].strip()] = _untyped(parameter[2])
        end = parameter.end()
    end = _skip(r"\s*</function>", text, end)
    end = _skip(r"\s*</tool_call>|", text, end) if opener["xml"].startswith("<tool_call>") else end
    return [_call(opener["xml_name"], arguments)], end


def _read_mistral(text: str, opener: re.Match[str]) -> _Found:
    if not opener["mistral_name"]:
        return _json_calls(text, opener.end(), short_id=True)
    arguments, end = _DECODER.raw_decode(text, opener.end())
    return [_call(opener["mistral_name"], arguments, call_id=opener["mistral_id"], short_id=True)], end


def _read_deepseek(text: str, opener: re.Match[str]) -> _Found:
    arguments, end = _DECODER.raw_decode(text, opener.end())
    end = _skip(r"\s*(```)?\s*<[｜|]tool[▁_]call[▁_]end[｜|]>(\s*<[｜|]tool[▁_]calls[▁_]end[｜|]>)?", text, end)
    return [_call(opener["deepseek_name"], arguments)], end


def _read_code(text: str, opener: re.Match[str]) -> _Found:
    code, closer, _ = text[opener.end() :].partition("```" if opener["code"].startswith("`") else "<|tool_call_end|>")
    return _python_calls(code), opener.end() + len(code) + len(closer)


def _json(closer: str = "", *, strict: bool = False) -> Callable[[str, re.Match[str]], _Found]:
    """Return a reader of JSON calls that a pattern ends."""

    def read(text: str, opener: re.Match[str]) -> _Found:
        calls, end = _json_calls(text, opener.end(), strict=strict)
        return calls, _skip(closer, text, end)

    return read


def _read_bare_python(text: str, opener: re.Match[str]) -> _Found:
    return _python_calls(text), len(text)


_FORMS: dict[str, tuple[str, Callable[[str, re.Match[str]], _Found]]] = {
    "xml": (r"(?:<tool_call>\s*)?<function=(?P<xml_name>[^<>\s]+)>", _read_xml),
    "hermes": (r"<tool_calls?>|<\|tool_call\|>", _json(r"\s*(</tool_calls?>|<\|/tool_call\|>)|")),  # may stop early
    "python_tag": (r"<\|python_tag\|>", _json()),
    "mistral": (
        r"\[TOOL_CALLS\]\s*(?:(?P<mistral_name>[\w.-]+)(?:\[CALL_ID\](?P<mistral_id>\w+))?(?:\[ARGS\])?(?=\{))?",
        _read_mistral,
    ),
    "deepseek": (
        r"(?:<[｜|]tool[▁_]calls[▁_]begin[｜|]>\s*)?<[｜|]tool[▁_]call[▁_]begin[｜|]>"
        r"(?:function<[｜|]tool[▁_]sep[｜|]>)?(?P<deepseek_name>[^\s<]+)(?:<[｜|]tool[▁_]sep[｜|]>|\s*```json)\s*",
        _read_deepseek,
    ),
    "code": (r"```tool_code\s*\n|<\|tool_call_start\|>", _read_code),
    "fence": (r"```(?:json|tool_call)?\s*\n(?=\s*[{\[])", _json(r"\s*```", strict=True)),
    "bare": (r"\A\s*(?=\{|\[\s*\{)", _json(r"\s*\Z", strict=True)),
    "bare_python": (r"\A\s*\[(?=\s*[A-Za-z_][\w.]*\()", _read_bare_python),
}
_OPENER = re.compile("|".join(f"(?P<{form}>{pattern})" for form, (pattern, _) in _FORMS.items()))
_PARAMETER = re.compile(r"\s*<parameter=([^<>\n]+)>\n?(.*?)\n?</parameter>", re.S)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse, strict=False)  # models write raw newlines inside strings


def _json_calls(text: str, at: int, *, strict: bool = False, short_id: bool = False) -> _Found:
    """Read one or more JSON values, each a call or a list of calls."""
    calls: list[ToolCall] = []
    end = _skip(r"\s*", text, at)
    while True:
        value, end = _DECODER.raw_decode(text, end)
        calls += [_call_of(item, strict, short_id) for item in (value if isinstance(value, list) else [value])]
        following = re.compile(r"\s*[;,]?\s*(?=\{)").match(text, end)
        if not following:
            break
        end = following.end()
    if not calls:
        raise ValueError("an empty list")
    return calls, end


def _call_of(item: Any, strict: bool, short_id: bool) -> ToolCall:
    """Return the call that a JSON object stands for; `strict` refuses what may be any object with a name."""
    if isinstance(item, dict) and isinstance(item.get("function"), dict):
        item = item | item["function"]  # OpenAI's own nesting
        del item["function"]
    if not isinstance(item, dict) or not isinstance(item.get("name"), str):
        raise ValueError("not a call")
    arguments = item.get("arguments", item.get("parameters"))
    if strict and (arguments is None or not item.keys() <= {"id", "type", "name", "arguments", "parameters"}):
        raise ValueError("it may be any object with a name")
    if isinstance(arguments, str):
        arguments = _DECODER.decode(arguments)
    return _call(item["name"], {} if arguments is None else arguments, call_id=item.get("id"), short_id=short_id)


def _python_calls(code: str) -> list[ToolCall]:
    """Read calls with literal keyword arguments: a list of them, or one a line, `print` around them or not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # for example of "\d" in a string
        body = ast.parse(code.strip()).body
    expressions = [statement.value for statement in body if isinstance(statement, ast.Expr)]
    if len(expressions) != len(body):
        raise ValueError("code beyond calls")
    nested = [value.elts if isinstance(value, ast.List) else [value] for value in expressions]
    calls = [_python_call(node) for nodes in nested for node in nodes]
    if not calls:
        raise ValueError("no call")
    return calls


def _python_call(node: ast.expr) -> ToolCall:
    if not isinstance(node, ast.Call):
        raise ValueError("not a call")
    if isinstance(node.func, ast.Name) and node.func.id == "print" and len(node.args) == 1:
        return _python_call(node.args[0])
    name = ast.unparse(node.func)
    if node.args or any(keyword.arg is None for keyword in node.keywords) or not re.fullmatch(r"[\w.]+", name):
        raise ValueError("arguments without names")
    return _call(name, {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in node.keywords})


def _call(name: str, arguments: Any, *, call_id: Any = None, short_id: bool = False) -> ToolCall:
    if not name or not isinstance(arguments, dict):
        raise ValueError("a call has a name and an object of arguments")
    if not isinstance(call_id, str) or not call_id:
        call_id = secrets.token_hex(5)[:9] if short_id else f"call_{secrets.token_hex(12)}"
    return ToolCall(id=call_id, type="function", function=Function(name=name, arguments=_to_json(arguments)))


def _to_json(arguments: dict[str, Any]) -> str:
    try:
        text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        text.encode("utf-8")
    except TypeError as error:
        raise ValueError("a value that JSON does not have") from error
    except UnicodeEncodeError:  # half of an escaped surrogate pair
        return json.dumps(arguments)
    return text


def _untyped(text: str) -> Any:
    try:
        value = _DECODER.decode(text)
    except (ValueError, RecursionError):
        return text
    return text if isinstance(value, str) else value


def _skip(pattern: str, text: str, at: int) -> int:
    """Return where the text continues after a pattern that has to match there."""
    match = re.compile(pattern).match(text, at)
    if match is None:
        raise ValueError("the call is not closed")
    return match.end()
