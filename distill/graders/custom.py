"""A custom grader, MODULE:FUNCTION, imported from the working directory.

`def f(problem: dict, content: str) -> bool | float | None` gets the problem as a JSON object and the whole content. It
returns whether the content is right, a score in [0, 1], or None if it cannot tell. It is trusted: the limits and the
time-out apply to it, the sandbox does not.
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
    """Return the function's verdict as a score."""
    score = _function(submission.argument)(dict(submission.problem), submission.content)
    if score is None:
        raise CannotTell(f"{submission.argument} cannot tell")
    if not isinstance(score, bool | int | float) or not 0 <= score <= 1:
        raise CannotTell(f"{submission.argument} returned {score!r}, not a bool, a score in [0, 1] or None")
    return float(score)


@cache
def _function(name: str) -> Callable[[dict[str, Any], str], Any]:
    module, _, function = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    found: Callable[[dict[str, Any], str], Any] = getattr(import_module(module), function)
    if not callable(found):
        raise TypeError(f"{name} is not a function")
    return found
