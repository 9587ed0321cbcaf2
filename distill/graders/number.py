"""A number, within a tolerance and across units: 1.5 km is 1500 m.

`number:tolerance=0.01` allows one per cent of the reference, `absolute=0.5` half a unit, `units=km` says what a
reference without a unit is measured in (and an answer that names none). Without them the values must be equal.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from .answer import clean, marked_answer
from .base import CannotTell, Submission, options
from .units import Dimension, unit

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d{1,300})(?:\.\d{1,300})?|\.\d{1,300}"
_VALUE = re.compile(
    rf"""(?P<sign>[-+]?)\s*(?:
        \\[dt]?frac\{{(?P<top>\d{{1,300}})\}}\{{(?P<bottom>\d{{1,300}})\}}
      | (?:(?P<whole>\d{{1,300}})\s+)?(?P<over>\d{{1,300}})\s*/\s*(?P<under>\d{{1,300}})(?![\d.,/])
      | (?P<number>{_DIGITS})(?![\d]|[,.]\d)
        (?:[eE](?P<e>[-+]?\d{{1,3}})(?!\d)
          | \s*(?:\\times|\\cdot|[×x*·])\s*10\s*\^\s*\{{?(?P<power>[-+]?\d{{1,3}})\}}?)?
    )""",
    re.VERBOSE,
)
_START = re.compile(r"(?<![\w.,])[-+]?\s*(?:\\[dt]?frac|\.?\d)")
_UNIT = re.compile(r"\s*(?P<unit>%|°\s*[CF]\b|°|[^\W\d_][^\n,;:!?()=<>\"+±]*)?")
_HEDGE = re.compile(
    r"\d\W*\b(?:or|and|to)\b|\b(?:not|isn't|or|between|than|either)\b|[<>≤≥≈±!^√\\]|\d\s*[*/×:]|[*/×:]\s*\d"
)

_OPTIONS: dict[str, Callable[[str], Any]] = {"tolerance": Fraction, "absolute": Fraction, "units": str}

Quantity = tuple[Fraction, str]  # a value and the text after it


def load(argument: str) -> None:
    """Check the argument."""
    known = options(argument, _OPTIONS)
    if "units" in known and not _measured(Fraction(1), known["units"]):
        raise CannotTell(f"the unit {known['units']!r} is unknown")


def grade(submission: Submission) -> float:
    """Return 1.0 for the value of the reference, else 0.0.

    Raises:
        CannotTell: the reference is no number, or the answer's unit is unknown where the reference has one.
    """
    known = options(submission.argument, _OPTIONS)
    gold = parse(clean(_plain(submission.reference())))
    if gold is None:
        raise CannotTell(f"the reference {submission.reference()[:40]!r} is no number")
    answer = find(submission.content)
    if answer is None:
        return 0.0
    unit_text = gold[1] or known.get("units", "")
    expected, given = _measured(gold[0], unit_text), _measured(answer[0], answer[1] or unit_text)
    if expected is None:
        if known.get("units") or gold[1]:
            raise CannotTell(f"the unit {unit_text[:40]!r} is unknown")
        # The reference is a bare number: what the answer counts ("42 legs") is its own affair, a percentage is not.
        scale = Fraction(1, 100) if answer[1] == "%" else Fraction(1)
        expected, given = (gold[0], ()), (answer[0] * scale, ())
    if unit_text == "%" and not answer[1]:  # of 50 % both "50" and "0.5" are said
        return 1.0 if gold[0] in (answer[0], answer[0] * 100) else 0.0
    if given is None:
        raise CannotTell(f"the unit {answer[1][:40]!r} is unknown")
    if expected[1] != given[1]:
        return 0.0
    one = _measured(Fraction(1), unit_text)
    slack = abs(expected[0]) * known.get("tolerance", 0) + known.get("absolute", 0) * (one[0] if one else 1)
    return 1.0 if abs(expected[0] - given[0]) <= slack else 0.0


def find(content: str) -> Quantity | None:
    """Return the quantity that a content ends in: the one that it marks as its answer, else the last of its last line.

    A text that hedges ("42 or 43"), negates or goes on calculating states none.
    """
    marked = marked_answer(content.strip())
    lines = _plain(content).strip().splitlines() if marked is None else [_plain(marked)]
    if not lines:
        return None
    text = clean(re.split(r"(?<![<>!~])=", lines[-1])[-1])
    whole = parse(text)
    if whole is not None:
        return whole
    clause = text if marked is None else re.split(r"[,;(]\s|\s\(|\s(?:since|because|as)\s", text)[0]
    found = [] if _HEDGE.search(clause) else _quantities(clause)
    return found[-1] if found and (marked is None or len(found) == 1) else None


def parse(text: str) -> Quantity | None:
    """Return the quantity that all of a text states: a number, then nothing, a unit or what is counted."""
    match = _VALUE.match(text.strip())
    if match is None:
        return None
    after = _UNIT.fullmatch(text.strip(), match.end())
    value = _value(match)
    if after is None or value is None:
        return None
    counted = clean(after["unit"] or "")
    is_words = re.fullmatch(r"[^\W\d_]+(?:[ '-][^\W\d_]+)*", counted) and text.strip()[match.end()].isspace()
    if counted and not is_words and counted != "°" and not _measured(value, counted):
        return None
    return None if is_words and _HEDGE.search(f"0 {counted} ") else (value, counted)


def _quantities(text: str) -> list[Quantity]:
    """Return the quantities in a sentence; none at all if one of its numbers is malformed, as `1,5` is."""
    found: list[Quantity] = []
    at = 0
    while start := _START.search(text, at):
        match = _VALUE.match(text, start.start())
        value = _value(match) if match else None
        if match is None or value is None:
            return []
        after = _UNIT.match(text, match.end())
        words = (after["unit"] or "").split() if after else []
        # The longest run of words that is a unit: of "5 metres per second fast" the first three.
        counts = [n for n in range(len(words), 0, -1) if _measured(value, clean(" ".join(words[:n])))]
        if not counts and re.match(r"[^\W\d_-]|-\w", text[match.end() :]):
            return []  # "5x" and "5-ish" are no numbers
        found.append((value, clean(" ".join(words[: counts[0]])) if counts else ""))
        at = match.end()
    return found


def _value(match: re.Match[str]) -> Fraction | None:
    sign = -1 if match["sign"] == "-" else 1
    try:
        if match["top"]:
            return sign * Fraction(int(match["top"]), int(match["bottom"]))
        if match["over"]:
            return sign * (int(match["whole"] or 0) + Fraction(int(match["over"]), int(match["under"])))
    except ZeroDivisionError:
        return None
    exponent = int(match["e"] or match["power"] or 0)
    return sign * Fraction(match["number"].replace(",", "")) * Fraction(10) ** exponent


def _measured(value: Fraction, text: str) -> tuple[Fraction, Dimension] | None:
    """Return a value in SI base units and its dimension; None if the unit is unknown or there is none."""
    if re.fullmatch(r"(?:°|degrees?\s+)\s*(?:C|F|Celsius|Fahrenheit)", text):
        value = value if text[-1] in "Cs" else (value - 32) * Fraction(5, 9)
        kelvin = unit("K")
        assert kelvin is not None
        return value + Fraction("273.15"), kelvin[1]
    known = unit(text)
    return None if known is None else (value * known[0], known[1])


def _plain(text: str) -> str:
    """Return a text without LaTeX's dressing, with ASCII minus signs."""
    text = text.replace("−", "-").replace("–", "-").replace(r"\%", "%").replace(r"^\circ", "°").replace(r"\degree", "°")
    text = re.sub(r"\\(?:text|mathrm|textrm|operatorname|unit)\s*\{([^{}]*)\}", r" \1", text)
    text = re.sub(r"\\[,;:! ]|\\left|\\right|~", " ", text.replace("{,}", ","))
    return text.replace("\\$", "").replace("$", "").replace("€", "").replace("£", "").replace("**", " ")
