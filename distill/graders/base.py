"""Graders, one a file: `grade(submission)` returns a score in [0, 1], and raises `CannotTell` where there is none.

A problem names its grader in one string, KIND or KIND:ARGUMENT; MODULE:FUNCTION is the user's own. docs/verification.md
describes each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from ...errors import UsageError
from ..records import NONE


class CannotTell(Exception):
    """A reference that cannot be read, tests that are broken, a limit that was reached: the verdict is unknown."""


@dataclass(frozen=True)
class Submission:
    """What a grader sees: the problem, all of the content, and the final answer that was found in it.

    `argument` is what stands after the grader's colon; `problem` is the problem as JSON has it.
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
        """What else the problem holds."""
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
    """One kind of grader: its module here, and whether it reads the final answer or the content as a whole."""

    module: str
    reads_answer: bool = True
    needs_reference: bool = True


KINDS = {
    "exact": Kind("exact"),
    "number": Kind("number", reads_answer=False),
    "math": Kind("mathematics"),
    "choice": Kind("choice", reads_answer=False),
    "regex": Kind("regex", needs_reference=False),
    "json_schema": Kind("json_schema", reads_answer=False, needs_reference=False),
    "python": Kind("code.python", reads_answer=False, needs_reference=False),
    "gym": Kind("gym", needs_reference=False),
}
_OWN = Kind("custom", reads_answer=False, needs_reference=False)


def kind_of(grader: str) -> tuple[Kind, str]:
    """Return a grader's kind and its argument.

    Raises:
        UsageError: there is no such grader.
    """
    name, _, argument = grader.partition(":")
    if name in KINDS:
        return KINDS[name], argument
    if argument.isidentifier() and all(part.isidentifier() for part in name.split(".")):
        return _OWN, grader
    raise UsageError(f"there is no grader {grader!r}", f"it is {', '.join(KINDS)}, {NONE} or your own MODULE:FUNCTION")


def is_trusted(grader: str) -> bool:
    """Say whether a grader runs code with the user's own rights, so that only the user may name it, never a file."""
    kind, argument = kind_of(grader)
    return kind is _OWN or (kind.module == "code.python" and argument != "")


def load(grader: str) -> Callable[[Submission], float | None]:
    """Return a grader's function, its libraries imported and its argument checked; the user's own function too.

    Raises:
        CannotTell: the argument is off, or this system cannot do what the grader takes.
        ImportError: a library is not installed.
    """
    kind, argument = kind_of(grader)
    module = import_module(f".{kind.module}", __package__)
    if hasattr(module, "load"):
        module.load(argument)
    function: Callable[[Submission], float | None] = module.grade
    return function


def options(argument: str, known: dict[str, Callable[[str], Any]]) -> dict[str, Any]:
    """Return the options in `a=1,b=2`, each read by its own function.

    Raises:
        CannotTell: an unknown option, or a value that cannot be read.
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
