"""What a file has to keep to be given its name: `accuracy >= 0.98 of bf16, loops <= 1%, kl <= 0.1`.

Conditions are separated by commas. `of bf16` makes a value a share of what the unquantized model reaches. A condition
on something that was not measured is an error, never a pass.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ...errors import UsageError

Metrics = Mapping[str, float | None]
METRICS = ("accuracy", "closed", "loops", "kl", "kl_p99", "same_top", "perplexity", "bytes")
"""What a gate may ask for; shares are between 0 and 1, divergences in nats."""

TASK_METRICS = frozenset({"accuracy", "closed", "loops"})
"""What takes answers to problems."""

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_CONDITION = re.compile(r"(\w+)\s*(>=|<=|>|<)\s*(\d+(?:\.\d+)?|\.\d+)\s*(%?)\s*(of\s+(?:bf16|unquantized))?")


@dataclass(frozen=True)
class Condition:
    """One thing to hold. `value` is a share of the reference's if `is_relative`."""

    metric: str
    operator: str
    value: float
    is_relative: bool

    def __str__(self) -> str:
        """Return it as a user writes it."""
        return f"{self.metric} {self.operator} {self.value:g}{' of bf16' if self.is_relative else ''}"

    def check(self, found: Metrics, reference: Metrics) -> str | None:
        """Return what is wrong, or None if the condition holds.

        Raises:
            UsageError: it was not measured.
        """
        value, base = found.get(self.metric), reference.get(self.metric) if self.is_relative else 1.0
        if value is None or base is None:
            raise UsageError(f"the gate asks for {self.metric}, which was not measured", "it takes traces and problems")
        if self.is_relative and base == 0 and ">" in self.operator:
            return f"{self.metric} of the unquantized model is 0, and a share of it says nothing"
        limit = self.value * base
        # A share of a share rounds: 0.98 * 0.5 is a hair above 0.49.
        holds = _OPERATORS[self.operator](value, limit) or ("=" in self.operator and abs(value - limit) < 1e-9)
        return None if holds else f"{self.metric} is {value:.4g}, not {self.operator} {limit:.4g}"


@dataclass(frozen=True)
class Gate:
    """Conditions that all have to hold."""

    conditions: tuple[Condition, ...]

    @classmethod
    def parse(cls, text: str) -> Gate:
        """Return the gate of a text.

        Raises:
            UsageError: it is none.
        """
        conditions = []
        for part in text.split(","):
            match = _CONDITION.fullmatch(part.strip().lower())
            if not match or match[1] not in METRICS:
                raise UsageError(
                    f"no condition of a gate: {part.strip()!r}",
                    f"such as 'accuracy >= 0.98 of bf16, loops <= 1%'; there are {', '.join(METRICS)}",
                )
            value = float(match[3]) / (100 if match[4] else 1)
            conditions.append(Condition(match[1], match[2], value, bool(match[5])))
        return cls(tuple(conditions))

    @property
    def needs_answers(self) -> bool:
        """Whether it takes answers to problems."""
        return any(condition.metric in TASK_METRICS for condition in self.conditions)

    def failures(self, found: Metrics, reference: Metrics) -> Sequence[str]:
        """Return what does not hold, nothing if all does.

        Raises:
            UsageError: a condition's metric was not measured.
        """
        checked = (condition.check(found, reference) for condition in self.conditions)
        return [failure for failure in checked if failure]

    def __str__(self) -> str:
        """Return it as a user writes it."""
        return ", ".join(map(str, self.conditions))
