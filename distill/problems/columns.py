"""The names that other people's files give to the columns of problems and traces, and what their values mean.

Problems and imported traces look for a question in different orders: of a row with both `prompt` and `instruction`, a
problem takes `prompt` and a trace takes `instruction`; only a trace knows `query`. Their answers differ too: a problem
takes the text of `solution`, a trace takes no column with worked solutions but what one puts in a box.
"""

from __future__ import annotations

import datetime
import decimal
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ...localrun.core.generation import Message
from ..graders.answer import clean, final_answer
from ..graders.quantity import parse

PROBLEM_QUESTIONS = ("question", "problem", "prompt", "instruction", "input", "messages")
TRACE_QUESTIONS = ("problem", "question", "instruction", "prompt", "query", "input")

PROBLEM_ANSWERS = (
    "answer", "final_answer", "answerkey", "answers", "solution", "output", "target", "ground_truth", "expected_answer",
    "reference_answer", "reward_model", "verification_info", "correct answer", "correct_answer", "correct", "cop",
)  # fmt: skip
TRACE_ANSWERS = (
    "answer", "final_answer", "ground_truth", "ground_truth_solution", "expected_answer", "verification_info",
    "reference_answer", "solution",
)  # fmt: skip
"""Reference answers, as opposed to what a model said."""

PROBLEM_METADATA = {
    "tests": ("tests", "test_list", "unit_tests", "test"),
    "test_setup": ("test_setup", "test_setup_code"),
    "entry_point": ("entry_point",),
    "schema": ("schema", "json_schema"),
}
"""What graders need beside the answer, by the name that they know it by."""
PROBLEM_CHOICES = ("choices", "options")
PROBLEM_CONTEXTS = ("context", "passage")
"""What is shown before the question."""
PROBLEM_ALIASES = ("aliases", "answer_aliases")
"""Other wordings of the reference."""
PROBLEM_WORKED = ("worked", "answer_cot", "solution", "worked_solution", "rationale", "explanation")
"""Worked solutions, from which `--teacher worked` makes traces."""

TRACE_REASONINGS = (
    "reasoning_content", "deepseek_reasoning", "reasoning", "reasoning_trace", "thinking", "thinking_trajectories",
    "deepseek_thinking_trajectory",
)  # fmt: skip
TRACE_CONTENTS = (
    "deepseek_solution", "generation", "generated_solution", "llm_response", "response", "completion", "content",
    "output", "attempt", "deepseek_attempt",
)  # fmt: skip
TRACE_WORKED = ("solution", "worked_solution")
"""Worked solutions, which are the answer where nothing else is one."""

ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant",
    "gpt": "assistant", "model": "assistant",
}  # fmt: skip

Together = Literal["all", "any"]


class Unusable(ValueError):
    """A value that cannot be what its column promises; the text says why."""


@dataclass(frozen=True)
class Reference:
    """A reference answer: its text, other right answers, and the worked solution that it came with.

    `together` says of several answers whether all are asked for or any is right; None if there is one.
    """

    text: str | None
    aliases: list[str] = field(default_factory=list)
    worked: str = ""
    together: Together | None = None


def find_column(row: Mapping[str, Any], named: str | None, usual: Iterable[str]) -> str | None:
    """Return the column that the user named, else the first usual one in any case; None if the row lacks it."""
    if named is not None:
        return named if named in row else None
    lower = {str(key).lower(): key for key in row}
    return next((lower[name] for name in usual if name in lower), None)


def read_reference(value: Any, *, together: Together | None = None, column: str = "") -> Reference:
    r"""Return the reference answer that a value is.

    Of GSM8K's steps only what follows `####` counts, and of a worked solution what it puts in `\boxed{}`. Several
    numbers or formulas have to be given all; several texts, and the lists of `answers`, are wordings of which any is
    right. `together` overrides that.

    Raises:
        Unusable: the value is infinite or no number, or its bytes are no text.
    """
    if isinstance(value, str) and value.strip().startswith(("[", "{")):
        value = _parsed(value, column)
    if isinstance(value, Mapping):
        inside = {str(key).lower(): item for key, item in value.items()}
        if "ground_truth" in inside:
            return read_reference(inside["ground_truth"], together=together)
        if "text" in inside and isinstance(inside["text"], list) and len(inside) <= 2:  # SQuAD
            return read_reference(inside["text"], together=together or "any")
        if {"value", "aliases"} <= inside.keys():  # TriviaQA
            found = read_reference(inside["value"], together=together)
            aliases = [text for text in map(as_text, inside.get("aliases") or []) if text and text != found.text]
            return Reference(found.text, aliases, found.worked, "any" if aliases else None)
        return Reference(as_text(value))
    if isinstance(value, list | tuple):
        return _several([text for text in map(as_text, value) if text], together, column)
    text = as_text(value)
    if text is None:
        return Reference(None)
    if "####" in text:
        return Reference(text.rsplit("####", 1)[1].strip() or None, worked=text)
    if "\\boxed" in text:
        boxed = final_answer(text, numeric=False)
        return Reference(boxed, worked=text if clean(text) != f"\\boxed{{{boxed}}}" else "")
    is_worked = column.lower() == "solution" and (len(text) > 80 or "\n" in text) and parse(text) is None
    return Reference(None, worked=text) if is_worked else Reference(text)


def _parsed(text: str, column: str) -> Any:
    """Return what a column holds as JSON text, if that is an object or a list with the reference, else the text."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    is_wrapped = isinstance(value, Mapping) and ("ground_truth" in value or "text" in value)
    is_list = isinstance(value, list) and column.lower() == "answers"
    return value if is_wrapped or is_list else text


def _several(texts: list[str], together: Together | None, column: str) -> Reference:
    texts = list(dict.fromkeys(texts))
    if len(texts) < 2:
        return Reference(texts[0] if texts else None)
    if together is None:
        are_values = all(parse(text) or re.search(r"[\\^=(\d]", text) for text in texts)
        together = "all" if are_values and column.lower() != "answers" else "any"
    if together == "any":
        return Reference(texts[0], texts[1:], together="any")
    return Reference(", ".join(texts), together="all")


def as_text(value: Any) -> str | None:
    """Return a value of a table as text; None for a blank one.

    Raises:
        Unusable: see `read_reference`.
    """
    if value is None:
        return None
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError as error:
            raise Unusable("it holds bytes that are no text") from error
    if isinstance(value, float | decimal.Decimal) and not math.isfinite(value):
        raise Unusable(f"the number {value} is not finite")
    if isinstance(value, decimal.Decimal):
        value = f"{value:f}"
    elif isinstance(value, datetime.date | datetime.time):
        value = value.isoformat()
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    if not text.isprintable() and re.search(r"[\ud800-\udfff]", text):
        raise Unusable("it holds half of a character (a lone surrogate)")
    return text.strip() or None


def trace_answer(row: Mapping[str, Any]) -> str | None:
    """Return the reference answer in a trace's row; of a worked solution only what it puts in a box."""
    for column in TRACE_ANSWERS:
        value = row.get(column)
        if column == "verification_info":
            value = _parsed(value, column) if isinstance(value, str) else value
            value = value.get("ground_truth") if isinstance(value, Mapping) else None
        if not isinstance(value, str | int | float) or not str(value).strip():
            continue
        if "solution" in column and parse(str(value)) is None:
            return final_answer(str(value), numeric=False) if "\\boxed" in str(value) else None
        return str(value).rsplit("####", 1)[-1].strip()
    return None


def read_turns(value: Any) -> list[Message] | None:
    """Return a conversation under our names, from `role` and `content` or from ShareGPT's `from` and `value`.

    It may be JSON text, and contents may be lists of text parts. None if the value is no such conversation.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    if not isinstance(value, list) or not value:
        return None
    messages: list[Message] = []
    for turn in value:
        role = ROLES.get(str(turn.get("role") or turn.get("from") or "")) if isinstance(turn, dict) else None
        text = _content(turn.get("content", turn.get("value"))) if role else None
        if role is None or text is None:
            return None
        thought = next(
            (turn[name] for name in TRACE_REASONINGS if isinstance(turn.get(name), str) and turn[name]), None
        )
        extra = {"reasoning_content": thought} if thought and role == "assistant" else {}
        messages.append({"role": role, "content": text} | extra)
    return messages


def _content(value: Any) -> str | None:
    if isinstance(value, list):
        texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in value]
        return "\n".join(texts) if texts and all(isinstance(text, str) for text in texts) else None  # type: ignore[arg-type]
    return value if isinstance(value, str) else None
