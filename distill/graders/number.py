"""A number, within a tolerance and across units: 1.5 km is 1500 m.

`number:tolerance=0.01` allows one per cent of the reference, `absolute=0.5` half a unit, `units=km` says what a
reference without a unit is measured in, as is an answer that names none. Without options the values must be equal.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from .answer import clause_of, clean, marked_answer
from .base import CannotTell, Submission, options
from .latex import plain
from .quantity import Quantity, hedges, parse, quantities
from .units import Dimension, asked_unit, measured


def tolerance(text: str) -> Fraction:
    """Read a tolerance, a number that is not negative.

    Raises:
        ValueError: it is anything else, or larger than can be meant.
    """
    if not re.fullmatch(r"\d{0,15}\.?\d{0,15}(?:[eE][-+]?\d{1,2})?", text):
        raise ValueError(text)
    return Fraction(text)


_OPTIONS: dict[str, Callable[[str], Any]] = {"tolerance": tolerance, "absolute": tolerance, "units": str}


def load(argument: str) -> None:
    """Check the argument."""
    known = options(argument, _OPTIONS)
    if "units" in known and not measured(Fraction(1), known["units"]):
        raise CannotTell(f"the unit {known['units']!r} is unknown")


def grade(submission: Submission) -> float:
    """Return 1.0 for the value of the reference, else 0.0.

    Raises:
        CannotTell: the reference is not a number, or it has a unit and the answer's unit is unknown.
    """
    known = options(submission.argument, _OPTIONS)
    gold = parse(clean(submission.reference()))
    if gold is None:
        raise CannotTell(f"the reference {submission.reference()[:40]!r} is not a number")
    answer = find(submission.content)
    if answer is None:
        return 0.0
    if "%" in (gold.unit, answer.unit):
        pairs = percentages(gold, answer)
        return 1.0 if any(_is_near(*pair, known=known) for pair in pairs) else 0.0
    unit = gold.unit or known.get("units", "") or asked_unit(submission.problem.get("question", ""), answer.unit)
    expected, given = _in_base_units(gold, unit, known), _in_base_units(answer, answer.unit or unit, known)
    if expected is None:  # the reference is a bare number, and the answer may say what it counts: "42 legs"
        return 1.0 if _is_near(gold.value, answer.value, known=known) else 0.0
    if given is None:
        raise CannotTell(f"the unit {answer.unit[:40]!r} is unknown")
    if expected[1] != given[1]:
        return 0.0
    one = measured(Fraction(1), unit)
    return 1.0 if _is_near(expected[0], given[0], known=known, unit=one[0] if one else Fraction(1)) else 0.0


def percentages(gold: Quantity, answer: Quantity) -> list[tuple[Fraction, Fraction]]:
    """Return the pairs of which one must be equal if a percentage and another number are to mean the same.

    50 % is 50 or 0.5, as the other one is written.
    """
    if gold.unit == answer.unit:
        return [(gold.value, answer.value)]
    if gold.unit and answer.unit:
        return []
    share = Fraction(1, 100)
    if gold.unit == "%":
        return [(gold.value, answer.value), (gold.value * share, answer.value)]
    return [(gold.value, answer.value), (gold.value, answer.value * share)]


def find(content: str) -> Quantity | None:
    """Return the quantity that a content ends with: the one marked as its answer, else the last one of the last line.

    A text that hedges ("42 or 43"), negates or is still calculating gives None.
    """
    marked = marked_answer(content)
    lines = plain_lines(content) if marked is None else [plain(marked)]
    if not lines:
        return None
    text = clean(re.split(r"(?<![<>!~])=|\\approx", lines[-1])[-1])
    whole = parse(text)
    if whole is not None:
        return whole
    clause = text if marked is None else clause_of(text)
    found = [] if hedges(clause) else quantities(re.sub(r"(?<=.)\([^()]*\)", " ", clause)) or quantities(clause)
    return found[-1] if found and (marked is None or len(found) == 1) else None


def plain_lines(content: str) -> list[str]:
    """Return the lines of a content that say something, in plain spelling."""
    return [line for line in map(plain, content.splitlines()) if line.strip(" `*_#-")]


def _in_base_units(quantity: Quantity, unit: str, known: dict[str, Any]) -> tuple[Fraction, Dimension] | None:
    if not quantity.unit and not known.get("units") and not unit:
        return None
    return measured(quantity.value, unit)


def _is_near(gold: Fraction, answer: Fraction, *, known: dict[str, Any], unit: Fraction = Fraction(1)) -> bool:
    return bool(abs(gold - answer) <= abs(gold) * known.get("tolerance", 0) + known.get("absolute", 0) * unit)
