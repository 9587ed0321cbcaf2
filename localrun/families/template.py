"""Render a chat template as transformers does: the same jinja settings, helpers and sandbox.

A template comes with a downloaded file, so it is foreign code: it runs in jinja's sandbox, with a bound on its time and
on what it writes, and may raise anything.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import Any, NoReturn

from jinja2 import Template, nodes
from jinja2.compiler import CodeGenerator
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ...errors import ModelError
from ..core.time_limit import time_limit

MAX_SECONDS = 10.0
_MAX_CHARACTERS = 16 << 20


def render(
    source: str | None,
    messages: Sequence[Mapping[str, Any]],
    *,
    thinking: bool | None,
    variables: Mapping[str, Any] = MappingProxyType({}),
    tools: Sequence[Mapping[str, Any]] | None = None,
    asks: bool = True,
) -> str:
    """Return the prompt for the next assistant turn; without `asks`, only the conversation.

    `thinking` is the template's `enable_thinking`, which None leaves undefined. `variables` has what else it may read,
    such as `bos_token`.

    `tools` and the messages' `tool_calls` have OpenAI's form, in which a call's `arguments` are a JSON text. Templates
    get the object that most expect; those that expect a text get that, see `_Arguments`.

    Raises:
        ModelError: code "no-chat-template": there is no `source`; "template-refused": the template is broken or refuses
            the conversation.
    """
    if not source:
        hint = "use an instruction-tuned model"
        raise ModelError("the model's file has no chat template", hint, code="no-chat-template")
    try:
        return _bounded(
            _compile(source),
            messages=[_as_templates_expect(message) for message in messages],
            tools=[dict(tool) for tool in tools] if tools else None,
            documents=None,
            add_generation_prompt=asks,
            **({} if thinking is None else {"enable_thinking": thinking}),
            **variables,
        )
    except Exception as error:  # a foreign template: whatever it does wrong is the model's fault
        raise ModelError(
            f"the model's chat template refuses the conversation: {error}", code="template-refused"
        ) from error


def _bounded(template: Template, **values: Any) -> str:
    """Return what a template writes.

    Raises:
        TemplateError: it writes more than any conversation has.
        TookTooLong: it does not come to an end.
    """
    pieces, n_characters = list[str](), 0
    with time_limit(MAX_SECONDS):
        for piece in template.generate(**values):
            pieces.append(piece)
            n_characters += len(piece)
            if n_characters > _MAX_CHARACTERS:
                raise TemplateError(f"it writes more than {_MAX_CHARACTERS:,} characters")
    return "".join(pieces)


class _Sandbox(ImmutableSandboxedEnvironment):
    """jinja's sandbox, in which no single operation makes a text of any size."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Compute a sum, product, power or remainder of numbers, and a text's or list's repetition if it is short."""
        sizes = [len(value) for value in (left, right) if isinstance(value, Sequence)]
        times = [value for value in (left, right) if isinstance(value, int)]
        is_long = sizes and times and sizes[0] * times[0] > _MAX_CHARACTERS
        if operator == "+" and sum(sizes) > _MAX_CHARACTERS:
            raise TemplateError("it makes something larger than any conversation")
        if (operator == "*" and is_long) or (operator == "**" and isinstance(right, int) and right > 64):
            raise TemplateError("it makes something larger than any conversation")
        if operator == "%" and isinstance(left, str):
            raise TemplateError("it formats with %, which may write any number of spaces")
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, function: Any, *given: Any, **named: Any) -> Any:
        """Call a function, unless a number says that it is to make or count to something huge: `zfill`, `center`."""
        if any(isinstance(value, int) and value > _MAX_CHARACTERS for value in (*given, *named.values())):
            raise TemplateError("it makes something larger than any conversation")
        return super().call(context, function, *given, **named)

    def joined(self, *values: Any) -> str:
        """Return `a ~ b ~ …`, which jinja would join to any length."""
        texts = list(map(str, values))
        if sum(map(len, texts)) > _MAX_CHARACTERS:
            raise TemplateError("it makes something larger than any conversation")
        return "".join(texts)


class _Code(CodeGenerator):
    """Has `a ~ b` joined by the sandbox."""

    def visit_Concat(self, node: nodes.Concat, frame: Any) -> None:
        self.write("environment.joined(")
        for value in node.nodes:
            self.visit(value, frame)
            self.write(", ")
        self.write(")")


_Sandbox.code_generator_class = _Code


class _Arguments(dict[str, Any]):
    """A call's arguments: an object, and its JSON text wherever a template puts it into text."""

    def __str__(self) -> str:
        return _to_json(self)

    def __add__(self, other: str) -> str:
        return f"{self}{other}"

    def __radd__(self, other: str) -> str:
        return f"{other}{self}"


def _as_templates_expect(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message with the arguments of its calls as objects, and its thinking also under gpt-oss's name."""
    calls = [
        dict(call) | {"function": dict(call["function"]) | {"arguments": _arguments(call["function"]["arguments"])}}
        for call in message.get("tool_calls") or ()
    ]
    thinking = {"thinking": message["reasoning_content"]} if message.get("reasoning_content") is not None else {}
    return thinking | dict(message) | ({"tool_calls": calls} if calls else {})


def _arguments(value: Any) -> Any:
    try:
        value = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value
    return _Arguments(value) if isinstance(value, Mapping) else value


@lru_cache(maxsize=8)
def _compile(source: str) -> Template:
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(source)


class _Generation(Extension):
    """Accept `{% generation %}` blocks, with which trainers mark the assistant's tokens, and keep only their text."""

    tags = {"generation"}  # noqa: RUF012 - jinja's own interface

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
