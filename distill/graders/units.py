"""Units of measurement and currencies: factor and dimension of `km`, `metres per second`, `kg·m^2/s²`, `EUR`.

Source of the units: the SI brochure, 9th edition (2019), and its tables of units accepted for use with the SI; the
exact definitions of the international yard and pound. Each currency is a dimension of its own.
"""

from __future__ import annotations

import re
from fractions import Fraction

Dimension = tuple[int, ...]
"""The exponents of metre, kilogram, second, ampere, kelvin, mole, byte, and of each currency."""

_CURRENCIES = {
    "USD": "$,US$,dollar,dollars", "EUR": "€,euro,euros", "GBP": "£", "JPY": "¥,yen", "INR": "₹,rupee,rupees",
    "CHF": "franc,francs", "CNY": "yuan,RMB",
}  # fmt: skip
_BASE_UNITS = ("m", "kg", "s", "A", "K", "mol", "B", *_CURRENCIES)
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
min minute,min 60 s; h hour,hr 3600 s; d day 86400 s; wk week 604800 s; in inch 254/10000 m; ft foot 3048/10000 m;
yd yard 9144/10000 m; mi mile 1609344/1000 m; lb pound,lbs 45359237/100000000 kg; oz ounce 28349523125/1000000000000 kg;
ha hectare 10000 m2; mph - 1609344/3600000 m.s-1; kph - 1000/3600 m.s-1; kmh - 1000/3600 m.s-1; rpm - 1/60 s-1;
atm atmosphere 101325 kg.m-1.s-2; % percent,per-cent 1/100 -; gal gallon 3785411784/1000000000000 m3;
acre - 40468564224/10000000 m2; kn knot 1852/3600 m.s-1; ¢ cent 1/100 USD; kmph - 1000/3600 m.s-1
"""
_IRREGULAR = {"feet": "foot", "inches": "inch", "hertz": "hertz", "acres": "acre"}


def measured(value: Fraction, text: str) -> tuple[Fraction, Dimension] | None:
    """Return a value in base units and its dimension; None if the unit is missing or unknown."""
    if match := re.fullmatch(r"(?:°|degrees?\s+)\s*(C|F)(?:elsius|ahrenheit)?", text):
        return (value if match[1] == "C" else (value - 32) * Fraction(5, 9)) + Fraction("273.15"), _dimension("K")
    known = unit(text)
    return None if known is None else (value * known[0], known[1])


def unit(text: str) -> tuple[Fraction, Dimension] | None:
    """Return factor and dimension of a unit such as `km`, `metres per second` or `kg·m^2/s²`; None if unknown."""
    text = text.strip().replace("²", "^2").replace("³", "^3").replace("⁻", "^-").replace("¹", "1").replace("μ", "µ")
    text = re.sub(r"\b(?:square|sq\.?) (\w+)", r"\1^2", re.sub(r"\b(?:cubic|cu\.?) (\w+)", r"\1^3", text))
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


def asked_unit(question: str, answered: str) -> str:
    """Return the unit that a question asks for ("in metres", "how many grams"); "" if it names none or several.

    Only a unit of the same dimension as the answer's counts, so that "in metres per second" says nothing of 5 m/s.
    """
    given = measured(Fraction(1), answered)
    words = re.findall(r"\b(?:in|how many)\s+((?:square |cubic )?[A-Za-z]{2,}|[mgs](?![\w/]))", question, re.IGNORECASE)
    known = [(word, measured(Fraction(1), word)) for word in words]
    asked = {value: word for word, value in known if value and given and value[1] == given[1]}
    return next(iter(asked.values())) if len(asked) == 1 else ""


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
    for code, names in _CURRENCIES.items():
        units |= dict.fromkeys([code, *names.split(",")], (Fraction(1), _dimension(code)))
    units |= {plural: units[single] for plural, single in _IRREGULAR.items()}
    units |= {"us": units["µs"], "um": units["µm"], "ug": units["µg"], "cc": units["cm"]}
    units["cc"] = Fraction(1, 1000000), _dimension("m3")
    return units


_UNITS = _unit_table()
