r"""Whether two formulas have the same value: parsed whole by latex2sympy, compared at high precision.

A symbolic comparison can be wrong (math-verify takes 1 - 1/e for 1 + 1/e) or run for ever. Here two formulas are the
same if their values agree to 25 digits, with each variable at several rational points: a difference that is not zero
everywhere is zero at points drawn at random with a probability of next to nothing.

Source: Schwartz, Fast probabilistic algorithms for verification of polynomial identities, 1980.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

from .base import CannotTell

_MAX_LENGTH = 2000  # characters; the parser takes minutes for more
_DIGITS = 40  # of every value; two values must agree in 25
_FUNCTIONS = (
    r"arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|log|ln|exp|sqrt"
    r"|pi|theta|alpha|beta|gamma|lambda|phi|omega|sigma|mu|infty"
)
_ENGLISH = re.compile(
    r"(?:all|an|and|any|are|as|at|be|both|but|by|can|day|did|do|few|for|get|got|has|he|her|him|his|how|if|in"
    r"|is|it|its|let|man|may|men|my|no|none|nor|not|now|odd|of|off|on|one|or|our|out|own|per|she|six|so"
    r"|sum|ten|the|to|too|two|up|us|use|was|way|we|who|why|yes|you)"
)
_WORD = re.compile(rf"(?<![\\A-Za-z])({_FUNCTIONS})(?![A-Za-z])")
_UNREADABLE = re.compile(
    r"(?<![\w}])\d+\s+\d|\d\s*[A-Z]\s*\d|\d_|[:?;&]|\.\.\.|(?<!\\)\bmod\b|\\p?mod|\\bmod|\\equiv|(?<![\\A-Za-z])[A-Za-z]{4,}"
)


def is_formula(text: str) -> bool:
    """Say whether a text is mathematics, since a parser would read "Paris" as the product P·a·r·i·s."""
    words = re.findall(r"(?<![\\A-Za-z])[A-Za-z]{2,}", re.sub(r"\\[a-zA-Z]+", " ", text))
    words = [word for word in words if not re.fullmatch(_FUNCTIONS, word)]
    if any(len(word) > 3 or _ENGLISH.fullmatch(word.casefold()) for word in words):
        return False
    return len(re.findall(r"(?:^|\s)[A-Za-z]{2,3}(?=\s|$)", text)) < 2  # "xy" is a product, "ab cd" is not


def read(text: str) -> Any:
    """Return a formula as sympy's expression; its decimals are exact.

    Raises:
        CannotTell: it is no formula as a whole.
    """
    if len(text) > _MAX_LENGTH or not is_formula(text):
        raise CannotTell(f"{text[:40]!r} is not mathematics")
    formula = _WORD.sub(r"\\\1 ", text.replace("%", r"\%"))
    formula = re.sub(r"\\(?:sqrt|exp) \(([^()]*)\)", lambda m: m[0][:5] + "{" + m[1] + "}", formula)
    formula = formula.replace(r"\exp{", "e^{").replace("*", r"\cdot ")
    formula = re.sub(r"(\d+(?:\.\d+)?)\s*°", r"(\\frac{\1\\pi}{180})", formula)
    formula = re.sub(r"\^(-?\d*\.?\d+)", r"^{\1}", formula)
    formula = re.sub(r"(?<![\d.}])(\d+)\s*/\s*(\d+)(?=\s*(?:[A-Za-z\\(]))", r"\\frac{\1}{\2}", formula)
    # The parser takes both for Euler's constant: other symbols stand in for them.
    formula = re.sub(r"\\([Gg])amma(?![A-Za-z])", lambda m: rf"\eta_{{{900 + ord(m[1])}}}", formula)
    if _UNREADABLE.search(formula):
        raise CannotTell(f"{text[:40]!r} cannot be read as one formula")
    formula = re.sub(r"(\d*)\.(\d+)", _exact_decimal, formula)
    import sympy
    from latex2sympy2_extended import latex2sympy
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig

    try:
        found = latex2sympy(
            formula, normalization_config=None, conversion_config=ConversionConfig(lowercase_symbols=False)
        )
    except Exception as error:
        raise CannotTell(f"{text[:40]!r} cannot be read as a formula") from error
    if not isinstance(found, sympy.Expr) or found.has(sympy.core.function.AppliedUndef):
        raise CannotTell(f"{text[:40]!r} is no single value")
    return found.subs(sympy.Symbol("i"), sympy.I)


def _exact_decimal(match: re.Match[str]) -> str:
    return rf"\frac{{{int(match[1] + match[2])}}}{{{10 ** len(match[2])}}}"


def value_of(formula: Any) -> Fraction | Any:
    """Return a constant's value: a Fraction if it is rational, else a sympy number of 40 digits; None for a variable.

    Raises:
        CannotTell: it has no finite value.
    """
    import sympy

    if formula.free_symbols:
        return None
    if formula.is_Rational:
        return Fraction(int(formula.p), int(formula.q))
    value = sympy.N(formula, _DIGITS)
    if not value.is_number or not value.is_finite:
        raise CannotTell(f"{str(formula)[:40]!r} has no finite value")
    return value


def is_same(one: Any, other: Any) -> bool:
    """Say whether two formulas have the same value wherever both have one.

    Raises:
        CannotTell: they have none where it was tried, or are the same for positive numbers only.
    """
    if one == other:
        return True
    symbols = sorted(one.free_symbols | other.free_symbols, key=str)
    signed = [list(_agreements(one, other, symbols=symbols, sign=sign)) for sign in (1, -1)]
    if not any(signed):
        raise CannotTell("the formulas have no value where they were compared")
    if all(map(all, signed)):
        return True
    if signed[0] and all(signed[0]):
        raise CannotTell("the formulas are the same for positive numbers only")
    return False


def is_multiple(one: Any, other: Any) -> bool:
    """Say whether one formula is a constant multiple of another, so that both are zero at the same points."""
    ratio = one / other
    if not ratio.free_symbols:
        return bool(ratio.is_finite and ratio != 0)
    first = next(_points(sorted(ratio.free_symbols, key=str), 1))
    constant = ratio.subs(first)
    return bool(constant.is_finite) and constant != 0 and is_same(ratio, constant)


def _agreements(one: Any, other: Any, *, symbols: list[Any], sign: int) -> Iterator[bool]:
    """Yield for each point where both have a value whether the values agree."""
    import sympy

    for point in _points(symbols, sign):
        values = [sympy.N(formula.subs(point), _DIGITS) for formula in (one, other)]
        if all(value.is_number and value.is_finite for value in values):
            difference, size = abs(values[0] - values[1]), max(abs(values[0]), abs(values[1]))
            yield bool(difference <= size * sympy.Float("1e-25", _DIGITS))


def _points(symbols: list[Any], sign: int) -> Iterator[dict[Any, Any]]:
    """Yield some points with rational coordinates, the same at every call: positive ones, or with both signs."""
    import sympy

    if not symbols:
        if sign > 0:
            yield {}
        return
    for trial in range(3):
        drawn = random.Random(f"{trial} {sign}")
        signs = [sign if i == trial % len(symbols) else drawn.choice((1, sign)) for i in range(len(symbols))]
        yield {s: side * sympy.Rational(drawn.randint(100, 2000), 997) for s, side in zip(symbols, signs, strict=True)}
