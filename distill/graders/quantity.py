r"""Read quantities: exact values with a unit, as people and models write them: `1,500 m`, `2\frac{1}{4}`, `5 million`.

A text is a quantity only as a whole: `12:30`, `3\pi` and `7 or 8` are none.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

from .latex import plain
from .units import measured

_N = r"\d{1,300}"
_DIGITS = rf"(?:\d{{1,3}}(?:,\d{{3}})+(?![,\d])|\d{{1,3}}(?:[ ]\d{{3}})+(?![ ]?\d)|{_N})(?:\.\d{{1,300}})?|\.{_N}"
_CURRENCY = r"(?:[$€£¥₹]|\b(?:USD|EUR|GBP|JPY|INR|CHF)\b)"
_NUMBER = re.compile(
    rf"""(?P<sign>[-+]?)\s*(?P<currency>{_CURRENCY})?\s*(?P<sign2>[-+]?)\s*(?:
        (?:(?P<whole>{_N})\s*)?\\frac\{{\s*(?P<top>-?{_N})\s*\}}\{{\s*(?P<bottom>-?{_N})\s*\}}
      | (?:(?P<mixed>{_N})(?:\s+|-))?(?P<over>{_N})\s*/\s*(?P<under>{_N})(?![\d.,/^])
      | (?P<number>{_DIGITS})\.?(?!\d|[,.]\d|\.\.|\s*/\s*\d)
        (?:[eE](?P<e>[-+]?\d{{1,3}})(?![\d.\w])
          | \s*(?:\\times|\\cdot|[x*])\s*10\s*\^\s*\{{?\s*(?P<power>[-+]?\d{{1,3}})(?:\s*\}})?(?!\d))?
        (?:\s+(?P<scale>hundred|thousand|million|billion|trillion|dozen)\b)?
    )""",
    re.VERBOSE,
)
_REPEATING = re.compile(r"([-+]?)(\d{0,300})\.(\d{0,300})(?:\\overline\{|\()(\d{1,300})[})]")
_COMMA = re.compile(
    r"(?P<whole>-?(?:\d{1,3}(?:\.\d{3})+|\d{1,9})),(?P<decimals>\d\d?)\s*(?P<unit>[€£$%]|[A-Za-zµ°²³/]{1,12})"
)
"""A decimal comma: before one or two digits with a unit behind them, where it can't separate two numbers."""
_SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
_START = re.compile(rf"(?<![\w.,\\{{^_])(?:[-+]?\s*{_CURRENCY}?\s*(?:\\frac\{{|\.?\d))")
_UNIT = re.compile(r"(?:%|°\s*[CF]\b|°|[$€£¥₹¢]|[^\W\d_][^\n,;:!?()=<>\"+±\\]*)?")
_NO_NOUN = re.compile(
    r"(?:and|as|at|between|choose|cubed|divided|dozen|either|factorial|from|half|hundred|infinity|less|million"
    r"|billion|trillion|minus|mod|modulo|more|no|not|of|off|or|out|over|per|plus|point|remainder|squared|than|thousand"
    r"|times|to|under|upto|versus|vs|with|without|wrong|incorrect)"
)
"""Words after a number that make another value of it, or a statement about it."""
_SPELT = {"degree": "°", "degrees": "°", "percent": "%", "per cent": "%", "pct": "%"}
_WORDS = {
    "zero": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9,
    "ten": 10, "eleven": 11, "twelve": 12, "thirteen": 13, "fourteen": 14, "fifteen": 15, "sixteen": 16,
    "seventeen": 17, "eighteen": 18, "nineteen": 19, "twenty": 20, "thirty": 30, "forty": 40, "fifty": 50,
    "sixty": 60, "seventy": 70, "eighty": 80, "ninety": 90,
}  # fmt: skip
_PARTS = {"half": 2, "halve": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6, "seventh": 7} | {
    "eighth": 8, "ninth": 9, "tenth": 10, "twelfth": 12, "twentieth": 20, "hundredth": 100,
}  # fmt: skip
_HEDGE = re.compile(
    r"\d\W*\b(?:or|and|to)\b|\b(?:not|cannot|can't|isn't|aren't|wasn't|never|or|between|than|either|neither|least|most"
    r"|wrong|incorrect|up to|almost|nearly|exceeds?|below|above|under|over|times|squared|cubed|factorial|mod)\b"
    r"|[<>±!^√]|\\(?:leq|geq|neq|pm|sqrt|log|pi|infty|times|cdot|binom)|\d\s*[*:]|[*:]\s*\d|\d_|[A-Za-z]\d|\d\+|\|"
)
_SPELT_OUT = re.compile(
    rf"\b(?:{'|'.join(sorted(_WORDS.keys() - {'one'}, key=len, reverse=True))})(?:-[a-z]+)?"
    rf"(?: (?:{'|'.join(_SCALES)}))?\b",
    re.IGNORECASE,
)
"""A number in words in a sentence; "one" is more often no number."""
_POWER_OF_TEN = re.compile(r"(?<=\d)\s*(?:\\times|\\cdot|[*x])\s*10\s*\^\s*\{?-?\d+\}?")


def hedges(text: str) -> bool:
    """Say whether a sentence calculates, compares or doubts, so that a number in it is not its result."""
    return _HEDGE.search(_POWER_OF_TEN.sub("", plain(text))) is not None


@dataclass(frozen=True)
class Quantity:
    """An exact value, the text of its unit or of what it counts, and how many decimals it was written with.

    `n_digits` counts the significant digits of a decimal number; it is 0 for a whole number or a fraction.
    """

    value: Fraction
    unit: str = ""
    n_decimals: int = 0
    n_digits: int = 0


def parse(text: str) -> Quantity | None:
    """Return the quantity if the whole text is one: a number, perhaps with a unit or with what is counted."""
    text = plain(text).strip(' *_`"“”')
    if comma := _COMMA.fullmatch(text):
        text = f"{comma['whole'].replace('.', '')}.{comma['decimals']} {comma['unit']}"
    if repeating := _REPEATING.fullmatch(text):
        return Quantity(_repeated(repeating))
    match = _NUMBER.match(text)
    if match is None:
        return _in_words(text)
    if (value := _value(match)) is None:
        return None
    rest = text[match.end() :]
    unit = _tidy_unit(rest)
    if match["currency"]:
        unit = match["currency"] if not unit or _is_noun(unit) else None
    elif unit and not _fits(rest, unit):
        unit = None
    if unit is None:
        return _sum(text)
    return _quantity(match, value, unit)


def _repeated(match: re.Match[str]) -> Fraction:
    """Return the value of a decimal with a period, such as 0.1(6)."""
    sign, whole, start, period = match.groups()
    nines = 10 ** len(period) - 1
    value = Fraction(int(whole or "0")) + Fraction(int(start or "0") * nines + int(period), 10 ** len(start) * nines)
    return -value if sign == "-" else value


def _in_words(text: str) -> Quantity | None:
    """Return a whole number below a hundred that is written out, perhaps with what is counted: "forty-two legs"."""
    first, _, rest = text.casefold().partition(" ")
    if (part := re.fullmatch(r"(an?|[a-z]+)[ -]([a-z]+?)s?", text.casefold())) and part[2] in _PARTS:
        top = 1 if part[1] in ("a", "an") else _WORDS.get(part[1], 0)
        return Quantity(Fraction(top, _PARTS[part[2]])) if top else None
    tens, _, ones = first.partition("-")
    if tens not in _WORDS or (ones and (_WORDS[tens] < 20 or not 0 < _WORDS.get(ones, 0) < 10)):
        return None
    scale, _, after = rest.partition(" ")
    times, rest = (_SCALES[scale], after) if scale in _SCALES else (1, rest)
    unit = _tidy_unit(rest)
    is_unit = unit == "" or unit == "%" or (unit is not None and (_is_noun(unit) or measured(Fraction(1), unit)))
    return Quantity(Fraction(_WORDS[tens] + _WORDS.get(ones, 0)) * times, unit or "") if is_unit else None


def quantities(text: str) -> list[Quantity]:
    """Return the quantities in a sentence, or nothing if one of its numbers is malformed, like `1,5`."""
    text, found, at = plain(text), list[Quantity](), 0
    while start := _START.search(text, at):
        match = _NUMBER.match(text, start.start())
        value = _value(match) if match else None
        if match is None or value is None:
            return []
        after = _UNIT.match(text[match.end() :].lstrip())
        words = (after[0] if after else "").split()
        # The longest run of words that is a unit: in "5 metres per second fast" the first three.
        counts = [n for n in range(min(len(words), 6), 0, -1) if measured(value, " ".join(words[:n]).rstrip(".,*"))]
        if not counts and re.match(r"[^\W\d_-]|-\w|\^|_|\{|\(", text[match.end() :]):
            return []  # "5x" and "5-ish" are not numbers
        unit = match["currency"] or (" ".join(words[: counts[0]]).rstrip(".,*") if counts else "")
        found.append(_quantity(match, value, unit))
        at = match.end()
    return found or [number for word in _SPELT_OUT.findall(text) if (number := _in_words(word))]


def _quantity(match: re.Match[str], value: Fraction, unit: str) -> Quantity:
    number = (match["number"] or "").replace(",", "").replace(" ", "")
    if "." not in number or match["e"] or match["power"] or match["scale"]:
        return Quantity(value, unit)
    decimals = number.partition(".")[2]
    return Quantity(value, unit, len(decimals), len(number.replace(".", "").lstrip("0")))


def _value(match: re.Match[str]) -> Fraction | None:
    sign = -1 if "-" in (match["sign"], match["sign2"]) else 1
    try:
        if match["top"]:
            return sign * (int(match["whole"] or 0) + Fraction(int(match["top"]), int(match["bottom"])))
        if match["over"]:
            return sign * (int(match["mixed"] or 0) + Fraction(int(match["over"]), int(match["under"])))
    except ZeroDivisionError:
        return None
    exponent, scale = int(match["e"] or match["power"] or 0), _SCALES.get(match["scale"], 1)
    return sign * Fraction(match["number"].replace(",", "").replace(" ", "")) * Fraction(10) ** exponent * scale


def _tidy_unit(rest: str) -> str | None:
    """Return the unit or the noun that the rest of a text is, "" for an empty rest, None for anything else."""
    rest = rest.strip().replace(r"\cdot ", "·").replace(r"\cdot", "·")
    if not rest:
        return ""
    rest = re.sub(r"\^\{?(-?\d)\}?", r"^\1", rest).removesuffix(".").rstrip()
    rest = re.sub(r"^-(?=[a-z]{3})", "", rest)  # "5-metre"
    if (spelt := _SPELT.get(rest.casefold())) is not None:
        return spelt
    return "" if re.fullmatch(r"(?:square |cubic |sq\.? )?units?(?:\^[23])?", rest.casefold()) else rest


def _is_noun(unit: str) -> bool:
    """Say whether a text may name what a number counts: a few words, none of which changes the number."""
    words = unit.casefold().replace("-", " ").split()
    is_words = all(re.fullmatch(r"[^\W\d_]+(?:'[^\W\d_]*)?", word) for word in words)
    return (
        is_words and len(words) <= 5 and not any(map(_NO_NOUN.fullmatch, words)) and max(map(len, words), default=0) > 1
    )


def _fits(rest: str, unit: str) -> bool:
    """Say whether the text after a number is its unit: `5 m`, `5cm`, `5%` and `42 legs`, but not `5x` and `2e`."""
    is_apart = rest[:1].isspace() or not rest[:1].isalpha() or rest[0] == "-"
    if measured(Fraction(1), unit):
        return is_apart or re.match(r"[^\W\d_]{2}", unit) is not None
    return is_apart and (unit in ("°", "¢") or (_is_noun(unit) and not rest.startswith("-")))


def _sum(text: str) -> Quantity | None:
    """Return the quantity of a text such as `2 hours 30 minutes`: the same dimension, from large to small."""
    parts = list(_sum_parts(text))
    if len(parts) < 2:
        return None
    values = [measured(part.value, part.unit) for part in parts]
    one = measured(Fraction(1), parts[0].unit)
    known = [value for value in values if value]
    if one is None or len(known) < len(parts) or len({dimension for _, dimension in known}) > 1:
        return None
    scales = [one_unit[0] for part in parts if (one_unit := measured(Fraction(1), part.unit))]
    if any(small >= large for large, small in pairwise(scales)):
        return None
    return Quantity(sum((value for value, _ in known), Fraction(0)) / one[0], parts[0].unit)


def _sum_parts(text: str) -> Iterator[Quantity]:
    at = 0
    while at < len(text):
        match = _NUMBER.match(text, at)
        value = _value(match) if match else None
        unit = re.compile(r"\s*([^\W\d_]+)\.?(?:\s*,?\s*(?:and\s+)?|$)").match(text, match.end()) if match else None
        if match is None or value is None or unit is None or value < 0:
            yield Quantity(Fraction(0))  # no unit: no sum
            return
        yield Quantity(value, unit[1])
        at = unit.end()
