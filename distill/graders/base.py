"""What a grader is: what it is given, how a problem names it, and `CannotTell` for the answers it cannot judge.

A problem names its grader in one string: KIND or KIND:ARGUMENT, or MODULE:FUNCTION for a custom one.
docs/verification.md describes each kind.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from ...errors import UsageError
from ..records import NONE


class CannotTell(Exception):
    """The verdict is unknown: the reference cannot be read, the tests are broken, or a limit was reached."""


@dataclass(frozen=True)
class Submission:
    """What a grader gets: the problem as a JSON object, the whole content, and the final answer found in it.

    `argument` is the text after the colon in the grader's name.
    """

    argument: str
    content: str
    answer: str | None
    problem: dict[str, Any] = field(default_factory=dict)
    timeout_s: float = 10.0

    @property
    def gold(self) -> str | None:
        """The reference answer."""
        return self.problem.get("answer")

    @property
    def metadata(self) -> dict[str, Any]:
        """The problem's metadata, such as tests or choices."""
        return self.problem.get("metadata") or {}

    def reference(self) -> str:
        """Return the reference answer.

        Raises:
            CannotTell: the problem has none.
        """
        if self.gold is None:
            raise CannotTell("the problem has no reference answer")
        return self.gold


@dataclass(frozen=True)
class Kind:
    """One kind of grader: its module, and whether it reads the final answer or the whole content."""

    module: str
    reads_answer: bool = True
    needs_reference: bool = True


KINDS = {
    "exact": Kind("exact"),
    "number": Kind("number", reads_answer=False),
    "math": Kind("mathematics", reads_answer=False),
    "choice": Kind("choice", reads_answer=False),
    "label": Kind("label", reads_answer=False),
    "json": Kind("json_value", reads_answer=False),
    "date": Kind("date", reads_answer=False),
    "regex": Kind("regex", needs_reference=False),
    "json_schema": Kind("json_schema", reads_answer=False, needs_reference=False),
    "python": Kind("code.python", reads_answer=False, needs_reference=False),
    "gym": Kind("gym", needs_reference=False),
}
_CUSTOM = Kind("custom", reads_answer=False, needs_reference=False)


def kind_of(grader: str) -> tuple[Kind, str]:
    """Return a grader's kind and its argument.

    Raises:
        UsageError: `code` "no-such-grader".
    """
    name, _, argument = grader.partition(":")
    if name in KINDS:
        return KINDS[name], argument
    if argument.isidentifier() and all(part.isidentifier() for part in name.split(".")):
        return _CUSTOM, grader
    raise UsageError(
        f"there is no grader {grader!r}",
        f"choose {', '.join(KINDS)} or {NONE}, or name your own as MODULE:FUNCTION",
        code="no-such-grader",
    )


def is_trusted(grader: str) -> bool:
    """Say whether a grader runs code with the user's own rights: then the user has to name it, a file may not."""
    kind, argument = kind_of(grader)
    return kind is _CUSTOM or (kind.module == "code.python" and argument != "")


def load(grader: str) -> Callable[[Submission], float | None]:
    """Import a grader with its libraries, check its argument, and return its function.

    Raises:
        CannotTell: the argument is invalid, or this system lacks what the grader needs.
        ImportError: a library is not installed.
    """
    kind, argument = kind_of(grader)
    module = import_module(f".{kind.module}", __package__)
    if hasattr(module, "load"):
        module.load(argument)
    function: Callable[[Submission], float | None] = module.grade
    return function


def options(argument: str, known: dict[str, Callable[[str], Any]]) -> dict[str, Any]:
    """Return the options of an argument such as `a=1,b=2`; `known` has the function that reads each value.

    Raises:
        CannotTell: an option is unknown, or its value cannot be read.
    """
    found: dict[str, Any] = {}
    for part in filter(None, argument.split(",")):
        name, equals, value = part.partition("=")
        if name not in known or not equals:
            raise CannotTell(f"the grader has no option {part!r}; it takes {', '.join(known) or 'none'}")
        try:
            found[name] = known[name](value)
        except ValueError as error:
            raise CannotTell(f"cannot read the option {part!r}") from error
    return found
