"""A regular expression that the whole final answer matches: `regex:PATTERN`, or the reference answer is the pattern."""

from __future__ import annotations

import re

from . import CannotTell, Submission


def grade(submission: Submission) -> float:
    """Return 1.0 if the pattern matches the final answer from its first character to its last, else 0.0."""
    pattern = submission.argument or submission.reference()
    try:
        compiled = re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise CannotTell(f"the pattern {pattern!r} is broken: {error}") from error
    assert submission.answer is not None
    return 1.0 if compiled.fullmatch(submission.answer) else 0.0
