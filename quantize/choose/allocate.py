"""Spend a number of bytes where they keep most: the best type for each tensor under a size, found exactly.

A file's divergence is taken as the sum of its tensors' damages. That makes the choice a knapsack with one choice an
item. The sizes have a large common divisor, since rows are whole blocks: dynamic programming in that unit is exact, and
takes a second.

Source: the linearity is that of Malinovskii et al., Pushing the limits of large language model quantization via the
linearity theorem (arXiv 2411.17525), with measured divergences instead of noise, and ggml's types.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from gguf import GGMLQuantizationType as Type

from ...errors import UsageError

_MOST_UNITS = 100_000  # of the table; a coarser unit rounds sizes up


@dataclass(frozen=True)
class Choice:
    """One way to store a tensor: its type, its bytes, and what it costs in nats a token.

    `error` is the importance-weighted squared error; `damage` is what a unit of it costs here, times it.
    """

    type: Type
    n_bytes: int
    error: float
    damage: float = 0.0


@dataclass(frozen=True)
class Item:
    """A tensor with its choices by size, the smallest first."""

    name: str
    choices: tuple[Choice, ...]

    def of(self, type_: Type) -> Choice:
        """Return the choice of a type."""
        return next(choice for choice in self.choices if choice.type == type_)


def efficient(choices: Sequence[Choice]) -> tuple[Choice, ...]:
    """Return the choices worth a thought, the smallest first: three that are no larger and err less rule one out.

    One is not enough: an error that is small and points the same way in every tensor flatters a type (see sensitivity).
    """
    ordered = sorted(choices, key=lambda one: (one.n_bytes, one.error))
    return tuple(one for i, one in enumerate(ordered) if sum(two.error <= one.error for two in ordered[:i]) < 3)


def solve(items: Sequence[Item], n_bytes: int) -> list[Choice]:
    """Return a choice for each item, together at most n_bytes, with the least total damage.

    Raises:
        UsageError: even the smallest choices take more.
    """
    least = sum(item.choices[0].n_bytes for item in items)
    if least > n_bytes:
        raise UsageError(
            f"{n_bytes / 1e6:.2f} MB of tensors are too few: the smallest types take {least / 1e6:.2f} MB",
            "give a larger --size or --bpw",
        )
    unit = math.gcd(*(choice.n_bytes for item in items for choice in item.choices))
    if n_bytes // unit > _MOST_UNITS:
        unit = -(-n_bytes // _MOST_UNITS)
    most = sum(max(choice.n_bytes for choice in item.choices) for item in items)
    # Rounded up to the unit everything still fits n_bytes; what that wastes is less than a unit an item.
    capacity = min(n_bytes, most + unit * len(items)) // unit
    best = np.zeros(capacity + 1)  # the least damage of the items so far in at most u units
    picks = []
    for item in items:
        totals = np.full((len(item.choices), capacity + 1), np.inf)
        for row, choice in zip(totals, item.choices, strict=True):
            size = -(-choice.n_bytes // unit)
            if size <= capacity:
                row[size:] = best[: capacity + 1 - size] + choice.damage
        picks.append(totals.argmin(axis=0).astype(np.uint8))
        best = totals.min(axis=0)
    if not np.isfinite(best[capacity]):  # only a coarse unit can do this
        return [item.choices[0] for item in items]
    chosen: list[Choice] = []
    for item, pick in zip(reversed(items), reversed(picks), strict=True):
        choice = item.choices[int(pick[capacity])]
        chosen.append(choice)
        capacity -= -(-choice.n_bytes // unit)
    return chosen[::-1]


def promoted(items: Sequence[Item], chosen: Sequence[Choice], n_more: int, most: int) -> list[Choice]:
    """Return the choices after raising the worst tensors: those that gain most for a byte, for n_more bytes or less.

    At least one is raised if any can be for `most` bytes, even if it takes more than n_more. Of `chosen` only the types
    count: its damages may be old.
    """
    chosen = [one.of(now.type) for one, now in zip(items, chosen, strict=True)]
    left, is_first = n_more, True
    while True:
        steps = [
            ((now.damage - up.damage) / (up.n_bytes - now.n_bytes), i, up)
            for i, (item, now) in enumerate(zip(items, chosen, strict=True))
            for up in item.choices
            if up.n_bytes > now.n_bytes and up.damage < now.damage
            if up.n_bytes - now.n_bytes <= (most if is_first else left)
        ]
        if not steps:
            return chosen
        _, i, up = max(steps, key=lambda step: step[0])
        left -= up.n_bytes - chosen[i].n_bytes
        chosen[i], is_first = up, False


def target_bytes(target: str, n_weights: int) -> int:
    """Return the bytes that a file for a kind of machine may take, at most what Q8_0 takes.

    A phone gives an app 2 GB and reads 15 GB/s, and 20 tokens/s are wanted of it; a laptop 6 GB, 50 GB/s and 12. A
    token reads every weight, and a fifth of the memory is for the cache and the program.

    Raises:
        UsageError: there is no such target.
    """
    machines = {"phone": (2e9, 15e9, 20), "laptop": (6e9, 50e9, 12)}
    if target not in machines:
        raise UsageError(f"no target {target!r}", f"one of {', '.join(machines)}")
    memory, bandwidth, rate = machines[target]
    return int(min(0.8 * memory, bandwidth / rate, 8.5 * n_weights / 8))
