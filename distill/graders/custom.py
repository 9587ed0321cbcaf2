"""The user's own grader, MODULE:FUNCTION, imported from the working directory.

`def f(problem: dict, content: str) -> bool | float | None` gets the problem as JSON has it and all of the content, and
returns whether it is right, a score in [0, 1], or None if it cannot tell. It is trusted: limits and time-out hold,
no confinement does.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

from .base import CannotTell, Submission


def load(name: str) -> None:
    """Import the function."""
    _function(name)


def grade(submission: Submission) -> float:
    """Return what the function says, as a score."""
    score = _function(submission.argument)(dict(submission.problem), submission.content)
    if score is None:
        raise CannotTell(f"{submission.argument} cannot tell")
    if not isinstance(score, bool | int | float) or not 0 <= score <= 1:
        raise CannotTell(f"{submission.argument} returned {score!r}, which is no bool, no score in [0, 1] and not None")
    return float(score)


@cache
def _function(name: str) -> Callable[[dict[str, Any], str], Any]:
    module, _, function = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    found: Callable[[dict[str, Any], str], Any] = getattr(import_module(module), function)
    if not callable(found):
        raise TypeError(f"{name} is no function")
    return found
