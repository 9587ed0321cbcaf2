"""Spend bytes where they keep the most: the best type for each tensor under a size, found exactly.

A file's divergence is taken as the sum of its tensors' damages, so this is a knapsack with one choice per item. Rows
are whole blocks, so the sizes have a large common divisor. Dynamic programming in that unit is exact and takes a
second.

Source: the linearity is that of Malinovskii et al., Pushing the limits of large language model quantization via the
linearity theorem (arXiv 2411.17525), with measured divergences instead of noise, and ggml's types.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Type

from ...errors import UsageError

_MAX_UNITS = 100_000  # the table's length; a coarser unit rounds sizes up


@dataclass(frozen=True)
class Choice:
    """One way to store a tensor: its type, its bytes, and its damage in nats a token.

    `error` is the importance-weighted squared error; `damage` is the error times what a unit of error costs here.
    """

    type: Type
    n_bytes: int
    error: float
    damage: float = 0.0


@dataclass(frozen=True)
class Item:
    """A tensor with its choices, the smallest first."""

    name: str
    choices: tuple[Choice, ...]

    def of(self, type_: Type) -> Choice:
        """Return the choice with this type."""
        return next(choice for choice in self.choices if choice.type == type_)


def efficient(choices: Sequence[Choice]) -> tuple[Choice, ...]:
    """Return the choices worth considering, the smallest first: three smaller ones with less error rule a choice out.

    One is not enough: an error that is small but points the same way in every tensor flatters a type (sensitivity.py).
    """
    ordered = sorted(choices, key=lambda choice: (choice.n_bytes, choice.error))
    return tuple(
        choice for i, choice in enumerate(ordered) if sum(other.error <= choice.error for other in ordered[:i]) < 3
    )


def solve(items: Sequence[Item], n_bytes: int) -> list[Choice]:
    """Return a choice for each item, in total at most n_bytes, with the least total damage.

    Raises:
        UsageError: `code` "budget-too-small": even the smallest choices take more.
    """
    least = sum(item.choices[0].n_bytes for item in items)
    if least > n_bytes:
        raise UsageError(
            f"the tensors do not fit {n_bytes / 1e6:.2f} MB: with the smallest types they take {least / 1e6:.2f} MB",
            "give a larger --size or --bpw",
            code="budget-too-small",
        )
    unit = math.gcd(*(choice.n_bytes for item in items for choice in item.choices))
    if n_bytes // unit > _MAX_UNITS:
        unit = -(-n_bytes // _MAX_UNITS)
    most = sum(max(choice.n_bytes for choice in item.choices) for item in items)
    # Sizes are rounded up to the unit, so the result fits n_bytes; that wastes less than a unit per item.
    capacity = min(n_bytes, most + unit * len(items)) // unit
    best = np.zeros(capacity + 1)  # [u]: the least damage of the items so far in at most u units
    picks = []
    for item in items:
        totals = np.full((len(item.choices), capacity + 1), np.inf)
        for row, choice in zip(totals, item.choices, strict=True):
            size = -(-choice.n_bytes // unit)
            if size <= capacity:
                row[size:] = best[: capacity + 1 - size] + choice.damage
        picks.append(totals.argmin(axis=0).astype(np.uint8))
        best = totals.min(axis=0)
    if not np.isfinite(best[capacity]):  # nothing fits: only the rounding of a coarse unit can cause this
        return [item.choices[0] for item in items]
    return _walk_back(items, picks, unit)


def _walk_back(items: Sequence[Item], picks: Sequence[npt.NDArray[np.uint8]], unit: int) -> list[Choice]:
    """Return the choices that lead to the last item's full capacity; `picks` `[u]` has each item's choice."""
    chosen, at = list[Choice](), -1
    for item, pick in zip(reversed(items), reversed(picks), strict=True):
        choice = item.choices[int(pick[at])]
        chosen.append(choice)
        at -= -(-choice.n_bytes // unit)
    return chosen[::-1]


def promoted(items: Sequence[Item], chosen: Sequence[Choice], *, n_more: int, most: int) -> list[Choice]:
    """Return the choices after raising the tensors that gain the most per byte, for at most n_more bytes.

    At least one is raised if `most` bytes are enough for it, even if it takes more than n_more. Only the types of
    `chosen` count: its damages may be outdated.
    """
    chosen = [item.of(now.type) for item, now in zip(items, chosen, strict=True)]
    left, is_first = n_more, True
    while True:
        raises = [
            ((now.damage - up.damage) / (up.n_bytes - now.n_bytes), i, up)
            for i, (item, now) in enumerate(zip(items, chosen, strict=True))
            for up in item.choices
            if up.n_bytes > now.n_bytes and up.damage < now.damage
            if up.n_bytes - now.n_bytes <= (most if is_first else left)
        ]
        if not raises:
            return chosen
        _, i, up = max(raises, key=lambda one: one[0])
        left -= up.n_bytes - chosen[i].n_bytes
        chosen[i], is_first = up, False


def target_bytes(target: Literal["phone", "laptop"], n_weights: int) -> int:
    """Return the bytes that a file may take on a kind of machine, at most those of Q8_0.

    A phone gives an app 2 GB, reads 15 GB/s and should reach 20 tokens/s; a laptop 6 GB, 50 GB/s and 12 tokens/s. Every
    token reads all weights, and a fifth of the memory is left to the cache and the program.
    """
    memory, bandwidth, rate = {"phone": (2e9, 15e9, 20), "laptop": (6e9, 50e9, 12)}[target]
    return int(min(0.8 * memory, bandwidth / rate, 8.5 * n_weights / 8))
