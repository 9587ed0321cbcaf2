"""A regular expression that the whole final answer must match: `regex:PATTERN`, else the reference is the pattern."""

from __future__ import annotations

import re

from .base import CannotTell, Submission


def load(argument: str) -> None:
    """Check the pattern."""
    _compiled(argument)


def grade(submission: Submission) -> float:
    """Return 1.0 if the pattern matches the final answer from its first character to its last, else 0.0."""
    assert submission.answer is not None
    return 1.0 if _compiled(submission.argument or submission.reference()).fullmatch(submission.answer) else 0.0


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise CannotTell(f"the pattern {pattern!r} is broken: {error}") from error
