"""Conditions that a file must meet before it gets its name: `accuracy >= 0.98 of bf16, loops <= 1%, kl <= 0.1`.

Commas separate the conditions. `of bf16` makes a value a share of the unquantized model's. A condition on something
that was not measured is an error, never a pass.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ...errors import UsageError

Metrics = Mapping[str, float | None]
METRICS = ("accuracy", "closed", "loops", "kl", "kl_p99", "same_top", "perplexity", "bytes")
"""The metrics that a gate can ask for; shares are between 0 and 1, divergences in nats."""

TASK_METRICS = frozenset({"accuracy", "closed", "loops"})
"""The metrics that need answers to problems."""

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_CONDITION = re.compile(r"(\w+)\s*(>=|<=|>|<)\s*(\d+(?:\.\d+)?|\.\d+)\s*(%?)\s*(of\s+(?:bf16|unquantized))?")


@dataclass(frozen=True)
class Condition:
    """A metric and its limit. `value` is a share of the reference's if `is_relative`."""

    metric: str
    operator: str
    value: float
    is_relative: bool

    def __str__(self) -> str:
        """Return it as a user writes it."""
        return f"{self.metric} {self.operator} {self.value:g}{' of bf16' if self.is_relative else ''}"

    def check(self, found: Metrics, reference: Metrics) -> str | None:
        """Return the reason why the condition fails, or None if it holds.

        Raises:
            UsageError: `code` "not-measured".
        """
        value, base = found.get(self.metric), reference.get(self.metric) if self.is_relative else 1.0
        if value is None or base is None:
            hint = "give traces and problems to measure with"
            raise UsageError(f"the gate asks for {self.metric}, which was not measured", hint, code="not-measured")
        if self.is_relative and base == 0 and ">" in self.operator:
            return f"the unquantized model's {self.metric} is 0, and a share of that says nothing"
        limit = self.value * base
        # A share of a share rounds: 0.98 * 0.5 is a hair above 0.49.
        holds = _OPERATORS[self.operator](value, limit) or ("=" in self.operator and abs(value - limit) < 1e-9)
        return None if holds else f"{self.metric} is {value:.4g}, not {self.operator} {limit:.4g}"


@dataclass(frozen=True)
class Gate:
    """Conditions that must all hold."""

    conditions: tuple[Condition, ...]

    @classmethod
    def parse(cls, text: str) -> Gate:
        """Read a gate as a user writes it.

        Raises:
            UsageError: `code` "bad-gate".
        """
        conditions = []
        for part in text.split(","):
            match = _CONDITION.fullmatch(part.strip().lower())
            if not match or match[1] not in METRICS:
                raise UsageError(
                    f"{part.strip()!r} is not a condition of a gate",
                    f"write it as 'accuracy >= 0.98 of bf16, loops <= 1%'; the metrics are {', '.join(METRICS)}",
                    code="bad-gate",
                )
            value = float(match[3]) / (100 if match[4] else 1)
            conditions.append(Condition(match[1], match[2], value, bool(match[5])))
        return cls(tuple(conditions))

    @property
    def needs_answers(self) -> bool:
        """Whether it can be checked only with answers to problems."""
        return any(condition.metric in TASK_METRICS for condition in self.conditions)

    def failures(self, found: Metrics, reference: Metrics) -> Sequence[str]:
        """Return the reasons of all conditions that fail.

        Raises:
            UsageError: `code` "not-measured".
        """
        checked = (condition.check(found, reference) for condition in self.conditions)
        return [failure for failure in checked if failure]

    def __str__(self) -> str:
        """Return it as a user writes it."""
        return ", ".join(map(str, self.conditions))
