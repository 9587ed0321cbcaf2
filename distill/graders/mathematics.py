"""The same mathematical value, checked by math-verify; text that is not mathematics can only be right or unknown."""

from __future__ import annotations

import re
from fractions import Fraction

from .base import CannotTell, Submission

_MAX_LENGTH = 2000  # characters; math-verify takes minutes for more
_PLAIN_NUMBER = re.compile(r"[-+]?\d{1,300}(?:\.\d{1,300})?")


def load(_: str) -> None:
    """Import the library, sympy with it."""
    import math_verify  # noqa: F401


def grade(submission: Submission) -> float:
    """Return 1.0 for the same value as the reference, 0.0 for another.

    Raises:
        CannotTell: the reference is not mathematics.
    """
    gold, answer = submission.reference().strip(), submission.answer
    assert answer is not None
    if not _normal(gold):
        raise CannotTell("the reference answer is empty")
    if _normal(gold) == _normal(answer):
        return 1.0
    if _PLAIN_NUMBER.fullmatch(gold) and _PLAIN_NUMBER.fullmatch(answer):  # sympy takes a thousand times longer
        if Fraction(gold) == Fraction(answer):
            return 1.0
        if "." not in gold + answer:
            return 0.0
    if len(answer) > _MAX_LENGTH:
        raise CannotTell("the answer is too long for math-verify")
    if not _is_formula(gold):
        raise CannotTell(f"the reference {gold[:40]!r} is not mathematics")
    from math_verify import parse, verify

    gold_value = parse(f"${gold.strip('$')}$")
    if not gold_value:
        raise CannotTell(f"the reference {gold[:40]!r} is not mathematics")
    # The plain reading comes second: of "x + 1" it would take the 1.
    value = parse(f"${answer.strip().strip('$')}$") or parse(answer)
    return 1.0 if verify(gold_value, value) else 0.0


def _normal(text: str) -> str:
    return " ".join(text.strip().strip("$").rstrip(".").casefold().split())


def _is_formula(text: str) -> bool:
    """Say whether a text is mathematics, since math-verify would read "Paris" as the product a·i·P·r·s."""
    words = re.findall(r"(?<!\\)\b[A-Za-z]{2,}\b", re.sub(r"\\[a-zA-Z]+", " ", text))
    return not set(words) - {"pi", "sqrt", "sin", "cos", "tan", "log", "ln", "exp", "inf", "oo", "mod"}
