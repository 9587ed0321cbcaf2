"""Two models answer the same problems: which answers flipped, and whether that is more than chance.

Source: Q. McNemar, Psychometrika 12 (1947), in its exact form; the interval is D. Bonett and R. Price's adjusted Wald
interval for a difference of paired shares, J. Educ. Behav. Stat. 37 (2012).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

_Z = 1.959964  # standard deviations on either side that hold 95 %


@dataclass(frozen=True)
class Answers:
    """A model's answers to test problems: whether each was right, in the problems' order, and three shares.

    `closed` is the share of thinking blocks that were closed, None if none was opened; `loops` is the share of answers
    that ended in a loop, `unknown` of those that no grader could judge.
    """

    right: tuple[bool, ...]
    closed: float | None
    loops: float
    unknown: float = 0.0

    @property
    def accuracy(self) -> float:
        """The share of right answers."""
        return sum(self.right) / len(self.right)

    def to_json(self) -> dict[str, float | None]:
        """Return its shares."""
        return {"accuracy": self.accuracy, "closed": self.closed, "loops": self.loops, "unknown": self.unknown}


@dataclass(frozen=True)
class Paired:
    """A model against its reference on `n` problems: right answers lost and gained, the difference of accuracies with
    its 95 % interval, and McNemar's exact two-sided p.
    """

    n: int
    lost: int
    gained: int
    difference: float
    interval: tuple[float, float]
    p_value: float

    def to_json(self) -> dict[str, Any]:
        """Return it as a JSON object."""
        return asdict(self) | {"interval": list(self.interval)}


def compare(reference: Sequence[bool], other: Sequence[bool]) -> Paired:
    """Return how another model's answers differ from the reference's, problem by problem.

    Raises:
        ValueError: the two have different numbers of answers, or none.
    """
    n = len(reference)
    if n == 0 or n != len(other):
        raise ValueError(f"{n} and {len(other)} answers cannot be paired")
    lost = sum(a and not b for a, b in zip(reference, other, strict=True))
    gained = sum(b and not a for a, b in zip(reference, other, strict=True))
    return Paired(n, lost, gained, (gained - lost) / n, interval(lost, gained, n=n), mcnemar(lost, gained))


def mcnemar(lost: int, gained: int) -> float:
    """Return the probability that flips by a fair coin are at least as lopsided."""
    n = lost + gained
    tail = sum(math.comb(n, k) for k in range(min(lost, gained) + 1))
    return min(1.0, float(Fraction(2 * tail, 2**n)))  # whole numbers: 2**n can exceed a float


def interval(lost: int, gained: int, *, n: int) -> tuple[float, float]:
    """Return the 95 % confidence interval of the difference of accuracies."""
    down, up = (lost + 1) / (n + 2), (gained + 1) / (n + 2)
    half = _Z * math.sqrt((down + up - (up - down) ** 2) / (n + 2))
    return max(-1.0, up - down - half), min(1.0, up - down + half)
