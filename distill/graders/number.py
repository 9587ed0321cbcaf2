"""A number, within a tolerance and across units: 1.5 km is 1500 m.

`number:tolerance=0.01` allows one per cent of the reference, `absolute=0.5` half a unit, `units=km` says what a
reference without a unit is measured in (and an answer that names none). Without them the values must be equal.
"""

from __future__ import annotations

import re
from fractions import Fraction

from . import CannotTell, Submission, options
from .answer import clean, marked_answer
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
_START = re.compile(r"(?<![\w.,^/])[-+]?\s*(?:\\[dt]?frac|\.?\d)")
_UNIT = re.compile(r"\s*(?P<unit>%|[^\W\d_°][^\n,;:!?()=<>\"]*|°\s*[CF]\b)?")

Quantity = tuple[Fraction, str]  # a value and the text after it


def grade(submission: Submission) -> float:
    """Return 1.0 for the value of the reference, else 0.0.

    Raises:
        CannotTell: the reference is no number, or the answer's unit is unknown where the reference has one.
    """
    known = options(submission.argument, {"tolerance": Fraction, "absolute": Fraction, "units": str})
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
    if given is None:
        raise CannotTell(f"the unit {answer[1][:40]!r} is unknown")
    if expected[1] != given[1]:
        return 0.0
    one = _measured(Fraction(1), unit_text)
    slack = abs(expected[0]) * known.get("tolerance", 0) + known.get("absolute", 0) * (one[0] if one else 1)
    return 1.0 if abs(expected[0] - given[0]) <= slack else 0.0


def find(content: str) -> Quantity | None:
    """Return the quantity that a content ends in: what it marks as its answer, else the last one of its last line."""
    marked = marked_answer(content.strip())
    if marked is not None:
        text = _plain(marked).rsplit("=", 1)[-1]
        return parse(clean(text)) or _only(text)
    lines = _plain(content).strip().splitlines()
    return (parse(clean(lines[-1].rsplit("=", 1)[-1])) or _last(lines[-1])) if lines else None


def parse(text: str) -> Quantity | None:
    """Return the quantity that all of a text states: a number, then nothing or a unit."""
    match = _VALUE.match(text.strip())
    if match is None:
        return None
    after = _UNIT.fullmatch(text.strip(), match.end())
    value = _value(match)
    return None if after is None or value is None else (value, clean(after["unit"] or ""))


def _quantities(text: str) -> list[Quantity]:
    found: list[Quantity] = []
    at = 0
    while start := _START.search(text, at):
        match = _VALUE.match(text, start.start())
        value = _value(match) if match else None
        at = match.end() if match else start.end()
        if match and value is not None:
            after = _UNIT.match(text, at)
            words = (after["unit"] or "").split() if after else []
            # The longest run of words that is a unit: of "5 metres per second fast" the first three.
            lengths = [n for n in range(len(words), 0, -1) if unit(clean(" ".join(words[:n])))]
            found.append((value, clean(" ".join(words[: lengths[0]])) if lengths else ""))
        elif match is None:
            found.append((Fraction(0), "?"))  # malformed: "1,5" is neither 1.5 nor 15
            at = re.compile(r"[\d.,/]*").match(text, at).end()  # type: ignore[union-attr]
    return found


def _last(text: str) -> Quantity | None:
    found = _quantities(text)
    return found[-1] if found and found[-1][1] != "?" else None


def _only(text: str) -> Quantity | None:
    """Return the one quantity of a marked answer such as "about 5 km"; two are no answer."""
    found = _quantities(text)
    return found[0] if len(found) == 1 and found[0][1] != "?" else None


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
    text = re.sub(r"\\(?:text|mathrm|textrm|operatorname|unit)\s*\{([^{}]*)\}", r" \1 ", text)
    text = re.sub(r"\\[,;:! ]|\\left|\\right|~", " ", text.replace("{,}", ","))
    return text.replace("\\$", "").replace("$", "").replace("€", "").replace("£", "").replace("*", " ")
