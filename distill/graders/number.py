"""A number, within a tolerance and across units: 1.5 km is 1500 m.

`number:tolerance=0.01` allows one per cent of the reference, `absolute=0.5` half a unit, `units=km` says what a
reference without a unit is measured in, as is an answer that names none. Without options the values must be equal.

Source of the units: the SI brochure, 9th edition (2019), and its tables of units accepted for use with the SI; the
exact definitions of the international yard and pound.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from .answer import clean, marked_answer
from .base import CannotTell, Submission, options

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
        CannotTell: the reference is not a number, or it has a unit and the answer's unit is unknown.
    """
    known = options(submission.argument, _OPTIONS)
    gold = parse(clean(_plain(submission.reference())))
    if gold is None:
        raise CannotTell(f"the reference {submission.reference()[:40]!r} is not a number")
    answer = find(submission.content)
    if answer is None:
        return 0.0
    unit_text = gold[1] or known.get("units", "")
    expected, given = _measured(gold[0], unit_text), _measured(answer[0], answer[1] or unit_text)
    if expected is None:
        if known.get("units") or gold[1]:
            raise CannotTell(f"the unit {unit_text[:40]!r} is unknown")
        # The reference is a bare number: the answer may say what it counts ("42 legs"), but a percentage changes it.
        scale = Fraction(1, 100) if answer[1] == "%" else Fraction(1)
        expected, given = (gold[0], ()), (answer[0] * scale, ())
    if unit_text == "%" and not answer[1]:  # both "50" and "0.5" may mean 50 %
        return 1.0 if gold[0] in (answer[0], answer[0] * 100) else 0.0
    if given is None:
        raise CannotTell(f"the unit {answer[1][:40]!r} is unknown")
    if expected[1] != given[1]:
        return 0.0
    one = _measured(Fraction(1), unit_text)
    slack = abs(expected[0]) * known.get("tolerance", 0) + known.get("absolute", 0) * (one[0] if one else 1)
    return 1.0 if abs(expected[0] - given[0]) <= slack else 0.0


def find(content: str) -> Quantity | None:
    """Return the quantity that a content ends with: the one marked as its answer, else the last one of the last line.

    A text that hedges ("42 or 43"), negates or is still calculating gives None.
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
    """Return the quantity if the whole text is one: a number, perhaps with a unit or with what is counted."""
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
    """Return the quantities in a sentence, or nothing if one of its numbers is malformed, like `1,5`."""
    found: list[Quantity] = []
    at = 0
    while start := _START.search(text, at):
        match = _VALUE.match(text, start.start())
        value = _value(match) if match else None
        if match is None or value is None:
            return []
        after = _UNIT.match(text, match.end())
        words = (after["unit"] or "").split() if after else []
        # The longest run of words that is a unit: in "5 metres per second fast" the first three.
        counts = [n for n in range(len(words), 0, -1) if _measured(value, clean(" ".join(words[:n])))]
        if not counts and re.match(r"[^\W\d_-]|-\w", text[match.end() :]):
            return []  # "5x" and "5-ish" are not numbers
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
    """Return a value in SI base units and its dimension; None if the unit is missing or unknown."""
    if re.fullmatch(r"(?:°|degrees?\s+)\s*(?:C|F|Celsius|Fahrenheit)", text):
        value = value if text[-1] in "Cs" else (value - 32) * Fraction(5, 9)
        kelvin = unit("K")
        assert kelvin is not None
        return value + Fraction("273.15"), kelvin[1]
    known = unit(text)
    return None if known is None else (value * known[0], known[1])


def _plain(text: str) -> str:
    """Return a text without LaTeX markup and with ASCII minus signs."""
    text = text.replace("−", "-").replace("–", "-").replace(r"\%", "%").replace(r"^\circ", "°").replace(r"\degree", "°")
    text = re.sub(r"\\(?:text|mathrm|textrm|operatorname|unit)\s*\{([^{}]*)\}", r" \1", text)
    text = re.sub(r"\\[,;:! ]|\\left|\\right|~", " ", text.replace("{,}", ","))
    return text.replace("\\$", "").replace("$", "").replace("€", "").replace("£", "").replace("**", " ")


Dimension = tuple[int, ...]  # exponents of metre, kilogram, second, ampere, kelvin, mole, byte

_BASE_UNITS = ("m", "kg", "s", "A", "K", "mol", "B")
_PREFIXES = {
    "G": ("giga", 9), "M": ("mega", 6), "k": ("kilo", 3), "h": ("hecto", 2), "d": ("deci", -1), "c": ("centi", -2),
    "m": ("milli", -3), "µ": ("micro", -6), "n": ("nano", -9), "T": ("tera", 12), "p": ("pico", -12),
}  # fmt: skip
# Symbol, names, factor, expression in base units.
_PREFIXED_UNITS = """
m metre,meter 1 m; g gram,gramme 1/1000 kg; s second,sec 1 s; A ampere,amp 1 A; K kelvin 1 K; mol mole 1 mol;
L litre,liter 1/1000 m3; l - 1/1000 m3; J joule 1 kg.m2.s-2; W watt 1 kg.m2.s-3; N newton 1 kg.m.s-2;
Pa pascal 1 kg.m-1.s-2; Hz hertz 1 s-1; V volt 1 kg.m2.s-3.A-1; C coulomb 1 A.s; F farad 1 kg-1.m-2.s4.A2;
Ω ohm 1 kg.m2.s-3.A-2; B byte 1 B; bit - 1/8 B; eV electronvolt 1602176634/10000000000000000000000000000 kg.m2.s-2;
cal calorie 4184/1000 kg.m2.s-2; Wh - 3600 kg.m2.s-2; bar - 100000 kg.m-1.s-2; t tonne 1000 kg
"""
_PLAIN_UNITS = """
min minute 60 s; h hour,hr 3600 s; d day 86400 s; wk week 604800 s; in inch 254/10000 m; ft foot 3048/10000 m;
yd yard 9144/10000 m; mi mile 1609344/1000 m; lb pound,lbs 45359237/100000000 kg; oz ounce 28349523125/1000000000000 kg;
ha hectare 10000 m2; mph - 1609344/3600000 m.s-1; kph - 1000/3600 m.s-1; kmh - 1000/3600 m.s-1; rpm - 1/60 s-1;
atm atmosphere 101325 kg.m-1.s-2; % percent,per-cent 1/100 -
"""
_IRREGULAR = {"feet": "foot", "inches": "inch", "hertz": "hertz"}


def unit(text: str) -> tuple[Fraction, Dimension] | None:
    """Return factor and dimension of a unit such as `km`, `metres per second` or `kg·m^2/s²`; None if unknown."""
    text = text.strip().replace("²", "^2").replace("³", "^3").replace("⁻", "^-").replace("¹", "1").replace("μ", "µ")
    text = re.sub(r"\bsquare (\w+)", r"\1^2", re.sub(r"\bcubic (\w+)", r"\1^3", text))
    text = re.sub(r"\s+per\s+|\s*/\s*", "/", text.replace("per cent", "percent"))
    if not text:
        return None
    factor, dimension = Fraction(1), [0] * len(_BASE_UNITS)
    for i, group in enumerate(text.split("/")):
        for part in re.split(r"[\s·.*×]+", group.strip("() ")):
            match = re.fullmatch(r"([^\d^-]+)(?:\^?\{?(-?\d)\}?)?", part)
            known = _UNITS.get(match[1]) or _UNITS.get(match[1].lower() if len(match[1]) > 3 else "") if match else None
            if match is None or known is None:
                return None
            exponent = int(match[2] or 1) * (-1 if i else 1)
            factor *= known[0] ** exponent
            dimension = [have + exponent * more for have, more in zip(dimension, known[1], strict=True)]
    return factor, tuple(dimension)


def _dimension(expression: str) -> Dimension:
    found = dict.fromkeys(_BASE_UNITS, 0)
    for part in () if expression == "-" else expression.split("."):
        base, exponent = re.fullmatch(r"([A-Za-z]+)(-?\d)?", part).groups()  # type: ignore[union-attr]
        found[base] += int(exponent or 1)
    return tuple(found.values())


def _unit_table() -> dict[str, tuple[Fraction, Dimension]]:
    units: dict[str, tuple[Fraction, Dimension]] = {}
    for table, prefixed in ((_PLAIN_UNITS, False), (_PREFIXED_UNITS, True)):
        for line in table.replace("\n", " ").split(";"):
            symbol, names, factor, expression = line.split()
            value, dimension = Fraction(factor), _dimension(expression)
            long = [name for name in names.replace("-", " ").split(",") if name.strip()]
            units[symbol] = value, dimension
            units |= {form: (value, dimension) for name in long for form in (name, f"{name}s")}
            for short, (prefix, power) in _PREFIXES.items() if prefixed else ():
                scaled = value * Fraction(10) ** power, dimension
                units.setdefault(short + symbol, scaled)
                units.update({prefix + form: scaled for name in long for form in (name, f"{name}s")})
    units |= {plural: units[single] for plural, single in _IRREGULAR.items()}
    units |= {"us": units["µs"], "um": units["µm"], "ug": units["µg"], "cc": units["cm"]}
    units["cc"] = Fraction(1, 1000000), _dimension("m3")
    return units


_UNITS = _unit_table()
