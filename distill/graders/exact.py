"""The same text, after Unicode normalisation and with white space collapsed; `exact:ignore_case` ignores case."""

from __future__ import annotations

import unicodedata

from .base import CannotTell, Submission


def load(argument: str) -> None:
    """Check the argument."""
    if argument not in ("", "ignore_case"):
        raise CannotTell(f"exact has no option {argument!r}; it takes ignore_case")


def grade(submission: Submission) -> float:
    """Return 1.0 if the final answer is the reference, else 0.0."""
    gold, answer = submission.reference(), submission.answer
    assert answer is not None
    forms = [" ".join(unicodedata.normalize("NFC", text).split()) for text in (gold, answer)]
    if submission.argument == "ignore_case":
        forms = [form.casefold() for form in forms]
    if not forms[0]:
        raise CannotTell("the reference answer is empty")
    return 1.0 if forms[0] == forms[1] else 0.0
