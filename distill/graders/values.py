r"""Read what a mathematical text says: a number with its unit, a formula, a set, a point, an interval, a matrix.

A text is read as a whole. `7 or 8` are two values, `x > 2` is an interval, `x = 5` is the value 5 with a name, and what
is no mathematics is `Words`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TypeAlias

from .answer import clean
from .base import CannotTell
from .expression import is_formula
from .latex import is_balanced, split_top
from .quantity import Quantity, parse
from .units import measured

_NAME = re.compile(
    r"(?:\\?[A-Za-z]+|[^\W\d_])(?:'*|_\{?\w+\}?)*(?:\^\{?-1\}?)?(?:\([^()]*\))?|[A-Za-z][A-Za-z ]{1,40}"
    r"|\\angle\s*\w+|\\overline\{\w+\}"
)
_RELATION = r"<|>|\\leq|\\geq|\\neq"
_MATRIX = r"\\begin\{(?:[pbvBV]?matrix|array)\}(?:\{[clr|]*\})?(?P<rows>.*)\\end\{(?:[pbvBV]?matrix|array)\}"
_JOINT = r",(?!\d{3}(?!\d))\s*(?:\\?\s*(?:and|or)\b)?|;|\b(?:and|or)\b|\\(?:land|lor|cup|text\{or\})(?![A-Za-z])"
_NOT_NUMBERS = re.compile(
    r"\d{4}-\d\d?-\d\d?|\d+(?:\s*:\s*\d+)+(?:\s*[ap]\.?m\.?)?|\w+_\{?\d+\}?(?<=[\d}])", re.IGNORECASE
)


@dataclass(frozen=True)
class Scalar:
    """One value: a quantity if it is a plain number, else a formula, perhaps with a unit; `name = …` has a name."""

    text: str
    number: Quantity | None
    unit: str = ""
    name: str = ""


@dataclass(frozen=True)
class Equation:
    """Two formulas that are equal, where neither is the name of the other: `x^2 + y^2 = 1`."""

    left: str
    right: str


@dataclass(frozen=True)
class Sequence:
    """Values in order: a point, a vector, an interval, a matrix of rows. `opening` and `closing` are its brackets."""

    items: tuple[Value, ...]
    opening: str = "("
    closing: str = ")"


@dataclass(frozen=True)
class Several:
    """Values in any order: a list, a set, a union of intervals, both signs of ±."""

    items: tuple[Value, ...]


@dataclass(frozen=True)
class Words:
    """Text that is no mathematics, in small letters and without punctuation."""

    text: str


Value: TypeAlias = Scalar | Equation | Sequence | Several | Words

_INFINITY, _MINUS_INFINITY = Scalar(r"\infty", None), Scalar(r"-\infty", None)
_DISTANCE = re.compile(r"\|\s*[A-Za-z]\s*(?:(?P<sign>[-+])\s*(?P<middle>[^|]+?)\s*)?\|")


def read(text: str) -> Value:
    """Return the value that a text in plain spelling is."""
    text = clean(text.rpartition(r"\implies")[2])
    text = re.sub(r"^\(?[A-Ea-e]\)\s+(?=\S)", "", text)  # the letter of a part or of a contest's choice
    if number := parse(text):
        return Scalar(text, number, number.unit)
    if text == r"\emptyset":
        return Several(())
    if text == r"\mathbb{R}":
        return Sequence((_MINUS_INFINITY, _INFINITY))
    if gap := re.fullmatch(r"\\mathbb\{R\}\s*\\setminus\s*\\\{(.+)\\\}", text):
        return _all_but(read(gap[1]))
    if _NOT_NUMBERS.fullmatch(text):
        return Words(squeezed(text))
    text = re.sub(r"^[A-Za-z]\s*\\in(?![A-Za-z])\s*", "", text)
    text = re.sub(r"^\\\{\s*[a-z]\s*(?:\\mid|\||:)\s*(.*)\\\}$", r"\1", text)
    parts = [part for part in split_top(text, _JOINT) if part]
    if len(parts) > 1:
        if re.search(r"\band\b|\\land", text) and any(re.search(_RELATION, part) for part in parts):
            raise CannotTell(f"{text[:40]!r} are conditions that hold together")
        return _several([read(part) for part in parts])
    if bracketed := _bracketed(text):
        return bracketed
    if matrix := _matrix(text):
        return matrix
    if re.search(_RELATION, text):
        return _relation(text)
    if "\\approx" in text:
        exact, _, rounded = text.partition("\\approx")
        text = exact.strip() if exact.strip() and not _NAME.fullmatch(exact.strip()) else rounded.strip()
    if "=" in text:
        return _equation(text)
    if "\\pm" in text:
        both = [read(text.replace("\\pm", sign).replace("\\mp", {"+": "-", "-": "+"}[sign])) for sign in "+-"]
        return _several(both)
    return _scalar(text)


def _matrix(text: str) -> Value | None:
    """Return the rows of a matrix, or a column as a point; a factor before it is multiplied in."""
    found = re.fullmatch(rf"(?P<factor>.*?)\s*(?:\\cdot|\\times)?\s*{_MATRIX}", text, re.DOTALL)
    if found is None:
        return None
    lines = [line for line in found["rows"].split(r"\\") if line.strip()]
    rows = [tuple(read(cell) for cell in line.split("&")) for line in lines]
    is_column = len(rows) > 1 and all(len(row) == 1 for row in rows)
    matrix = Sequence(tuple(row[0] for row in rows)) if is_column else Sequence(tuple(map(Sequence, rows)), "[", "]")
    return _scaled(found["factor"], matrix) if found["factor"] else matrix


def _scaled(factor: str, value: Value) -> Value:
    """Return a matrix with a factor multiplied into each of its values."""
    if isinstance(value, Sequence):
        return Sequence(tuple(_scaled(factor, item) for item in value.items), value.opening, value.closing)
    if not isinstance(value, Scalar):
        raise CannotTell(f"cannot multiply by {factor[:20]!r}")
    factor = f"{factor}1" if factor in ("-", "+") else factor
    return Scalar(rf"({factor}) \cdot ({value.text})", None)


def _several(items: list[Value]) -> Value:
    """Return values as one, in any order; `x = 1 or x = 2` are values of one x, `x = 1, y = 2` a pair."""
    flat = [one for item in items for one in (item.items if isinstance(item, Several) else [item])]
    if any(isinstance(item, Words) for item in flat):
        return Words(squeezed(" ".join(item.text for item in flat if isinstance(item, Words | Scalar))))
    names = {re.sub(r"_\{?\w+\}?", "", item.name) for item in flat if isinstance(item, Scalar)}
    if len(names) == 1:
        flat = [Scalar(item.text, item.number, item.unit) if isinstance(item, Scalar) else item for item in flat]
    return Several(tuple(flat))


def _bracketed(text: str) -> Value | None:
    opening = next((mark for mark in (r"\{", r"\langle", "(", "[", "]") if text.startswith(mark)), None)
    closing = next((mark for mark in (r"\}", r"\rangle", ")", "]", "[") if text.endswith(mark)), None)
    if opening is None or closing is None or len(text) < 2:
        return None
    inside = text[len(opening) : len(text) - len(closing)]
    if not is_balanced(inside):
        return None  # (x+1)(x-1)
    parts = split_top(inside, r",(?!\d{3}(?!\d))|;|\\mid" if opening == r"\{" else r"[,;]")
    if opening == r"\{":
        return Several(tuple(read(part) for part in parts if part))
    if len(parts) < 2:
        return read(inside) if (opening, closing) == ("(", ")") else None
    if opening == r"\langle":
        opening, closing = "(", ")"
    return Sequence(tuple(map(read, parts)), opening, closing)


def _relation(text: str) -> Value:
    """Return the interval that an inequality in one name describes."""
    parts = re.split(rf"({_RELATION})", text)
    sides, signs = [part.strip() for part in parts[::2]], parts[1::2]
    if len(sides) == 2 and (distance := _DISTANCE.fullmatch(sides[0])):
        return _around(distance, signs[0], sides[1])
    if len(sides) == 2 and not _NAME.fullmatch(sides[0]) and _NAME.fullmatch(sides[1]):
        sides, signs = sides[::-1], [{"<": ">", ">": "<", r"\leq": r"\geq", r"\geq": r"\leq"}.get(signs[0], signs[0])]
    if len(sides) == 2 and _NAME.fullmatch(sides[0]) and not _NAME.fullmatch(sides[1]):
        end = read(sides[1])
        if signs[0] == r"\neq":
            return _all_but(end)
        if signs[0] in ("<", r"\leq"):
            return Sequence((_MINUS_INFINITY, end), "(", ")" if signs[0] == "<" else "]")
        return Sequence((end, _INFINITY), "(" if signs[0] == ">" else "[", ")")
    if len(sides) == 3 and _NAME.fullmatch(sides[1]):
        if set(signs) <= {">", r"\geq"}:
            sides, signs = sides[::-1], [{">": "<", r"\geq": r"\leq"}[sign] for sign in signs[::-1]]
        if set(signs) <= {"<", r"\leq"}:
            low, high = ("(" if signs[0] == "<" else "["), (")" if signs[1] == "<" else "]")
            return Sequence((read(sides[0]), read(sides[2])), low, high)
    raise CannotTell(f"cannot compare the condition {text[:40]!r}")


def _all_but(value: Value) -> Value:
    """Return the real numbers without one."""
    if isinstance(value, Several):
        raise CannotTell("more than one number is left out")
    return Several((Sequence((_MINUS_INFINITY, value)), Sequence((value, _INFINITY))))


def _around(distance: re.Match[str], sign: str, radius: str) -> Value:
    """Return the interval of `|x - 3| < 2`, or the two of `|x - 3| > 2`."""
    middle = {"-": "", "+": "-"}[distance["sign"]] + f"({distance['middle']})" if distance["sign"] else "0"
    low, high = Scalar(f"{middle} - ({radius})", None), Scalar(f"{middle} + ({radius})", None)
    if sign in ("<", r"\leq"):
        return Sequence((low, high), *("()" if sign == "<" else "[]"))
    outside = (_MINUS_INFINITY, low), (high, _INFINITY)
    ends = (")", "(") if sign == ">" else ("]", "[")
    return Several((Sequence(outside[0], "(", ends[0]), Sequence(outside[1], ends[1], ")")))


def _equation(text: str) -> Value:
    """Return the value of `x = …` or of the end of a calculation, else the equation."""
    sides = split_top(text, "=")
    if re.fullmatch(r"\(\s*[a-z](?:\s*,\s*[a-z])+\s*\)", sides[0]):  # (x, y) = (1, 2)
        return read(sides[-1])
    if _NAME.fullmatch(sides[0]) or not re.search(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", sides[0])):
        value = read(sides[-1])
        name = sides[0].split()[-1] if _NAME.fullmatch(sides[0]) else ""  # "the equation of the line is y"
        is_symbol = name and not re.fullmatch(r"[A-Za-z]{2,}", name)
        return replace(value, name=name) if isinstance(value, Scalar) and is_symbol else value
    if not all(map(is_formula, sides)):
        return Words(squeezed(text))
    if len(sides) == 2:
        return Equation(*sides)
    raise CannotTell(f"cannot compare the equation {text[:40]!r}")


def _scalar(text: str) -> Value:
    """Return a formula, with its unit if it is a constant, or words."""
    tokens = text.split(" ")
    for n in range(1, min(len(tokens), 5)):
        formula, unit = " ".join(tokens[:-n]), " ".join(tokens[-n:])
        is_constant = not re.search(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", formula))
        is_unit = measured(Fraction(1), unit) or re.fullmatch(r"[A-Za-z]{3,}(?: [A-Za-z]{2,})*", unit)
        if is_constant and is_unit and re.search(r"[\d}]|\\pi", formula) and not re.search(r"[-+*/^(]$", formula):
            unit = "" if re.fullmatch(r"(?:square |cubic )?units?", unit) else unit
            return Scalar(formula, parse(formula), unit)
    if text.endswith(("°", "%")) and len(text) > 1 and not re.search(r"(?:sin|cos|tan|cot|sec|csc)\b", text):
        return Scalar(text[:-1], None, text[-1])
    if text.startswith("$"):
        return Scalar(text[1:], None, "$")
    return Scalar(text, None) if is_formula(text) else Words(squeezed(text))


def squeezed(text: str) -> str:
    """Return a text in small letters, without decoration and the white space and braces that change nothing."""
    return tight(text).casefold()


def tight(text: str) -> str:
    """Return a text without decoration and without the white space and braces that change nothing."""
    text = " ".join(clean(text).split())
    text = re.sub(r"(?<![\w.])\s+|\s+(?![\w.])", "", text)
    text = re.sub(r"\b([apAP])\.?([mM])\.?$", r"\1\2", text)
    text = re.sub(r"(?<=\d)(?:st|nd|rd|th)\b", "", text)
    return re.sub(r"([_^])\{(\w)\}", r"\1\2", text)
