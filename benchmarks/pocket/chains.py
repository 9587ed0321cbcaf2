"""The worked chains that the pocket teacher learns: one function a family of reasoning-gym problems.

Every step is small enough for a model of a million parameters, and so for the student: a sum takes one digit of the
second number at a time (`47+85=127+5=132`), highest first, and a difference that would go below zero is turned round
(`5-47=-(47-5)=-42`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

Metadata = Mapping[str, Any]


def add(a: int, b: int) -> str:
    """Return the chain of `a+b` for a, b >= 0: `47+85=127+5=132`."""
    return _digit_by_digit(a, b, 1)


def subtract(a: int, b: int) -> str:
    """Return the chain of `a-b` for a >= b >= 0: `132-47=92-7=85`."""
    return _digit_by_digit(a, b, -1)


def combine(a: int, operator: str, b: int) -> str:
    """Return the chain of `a operator b` for any a and b >= 0, with every step on numbers that are not negative."""
    if operator == "+" and a < 0:
        if b >= -a:
            return f"{a}+{b}=" + subtract(b, -a)
        return f"{a}+{b}=" + _negated(subtract(-a, b))
    if operator == "-" and a < 0:
        return f"{a}-{b}=" + _negated(add(-a, b))
    if operator == "-" and a < b:
        return f"{a}-{b}=" + _negated(subtract(b, a))
    return add(a, b) if operator == "+" else subtract(a, b)


def chain_sum(metadata: Metadata) -> str:
    """`12 + 30 - 47` -> `12+30=42`, `42-47=-(47-42)=-(7-2)=-5`."""
    tokens = str(metadata["expression"]).split()
    total, lines = int(tokens[0]), list[str]()
    for operator, term in zip(tokens[1::2], tokens[2::2], strict=True):
        lines.append(combine(total, operator, int(term)))
        total += int(term) if operator == "+" else -int(term)
    return "\n".join(lines)


def leg_counting(metadata: Metadata) -> str:
    """`13 woodlouses, 8 tigers` -> the legs of each kind, then the running total."""
    from reasoning_gym.arithmetic.leg_counting import ANIMALS

    total, lines = 0, list[str]()
    for animal, count in metadata["animals"].items():
        legs = int(ANIMALS[animal])
        line = f"{count} {animal}{'s' if count > 1 else ''} {count}*{legs}={count * legs}"
        lines.append(line if not lines else f"{line} {add(total, count * legs)}")
        total += count * legs
    return "\n".join(lines)


def simple_geometry(metadata: Metadata) -> str:
    """A polygon's last angle: what the angles sum to, the sum of the known ones, the difference."""
    sides, angles = int(metadata["n_sides"]), [int(angle) for angle in metadata["known_angles"]]
    whole, total = 180 * (sides - 2), angles[0]
    lines = [f"({sides}-2)*180={whole}"]
    for angle in angles[1:]:
        lines.append(add(total, angle))
        total += angle
    return "\n".join([*lines, subtract(whole, total)])


def count_bits(metadata: Metadata) -> str:
    """Halve the number until it is 1, counting the odd ones: `13 odd 1`, `6 even 1`, `3 odd 2`, `1 odd 3`."""
    number, ones, lines = int(metadata["number"]), 0, []
    while number:
        ones += number % 2
        lines.append(f"{number} {'odd' if number % 2 else 'even'} {ones}")
        number //= 2
    return "\n".join(lines)


CHAINS: dict[str, Callable[[Metadata], str]] = {
    "chain_sum": chain_sum,
    "leg_counting": leg_counting,
    "simple_geometry": simple_geometry,
    "count_bits": count_bits,
}
"""The chain of each family that the pocket teacher answers."""


def final_answer(chain: str) -> str:
    """Return the number that a worked chain ends in: its own last number, never the problem's stored answer."""
    return str(re.findall(r"-?\d+", chain.rsplit("=", 1)[-1].rsplit(" ", 1)[-1])[-1])


def _digit_by_digit(a: int, b: int, sign: int) -> str:
    operator, text = "+" if sign > 0 else "-", ""
    while True:
        text += f"{a}{operator}{b}="
        top = b - b % 10 ** (len(str(b)) - 1)  # the highest digit of b with its zeros: 85 -> 80
        a, b = a + sign * top, b - top
        if not b:
            return f"{text}{a}"


def _negated(chain: str) -> str:
    return "=".join(f"-({part})" if re.search(r"\d[+-]", part) else f"-{part}" for part in chain.split("="))
