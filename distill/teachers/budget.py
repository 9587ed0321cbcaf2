"""What a run may cost, when it has to stop, and what it will cost in all, judged from its samples so far."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from ...localrun.core.generation import Completion
from ...localrun.core.text import format_duration
from ..recipe.gathering import CostRecipe

_JUDGED_FROM = 20  # samples: fewer say little about the rest


@dataclass(frozen=True)
class Projection:
    """What a number of samples takes: tokens, dollars (None without a price) and hours."""

    n_prompt: float
    n_completion: float
    usd: float | None
    hours: float

    def __str__(self) -> str:
        tokens = self.n_prompt + self.n_completion
        size = f"{tokens / 1e6:.1f} M" if tokens >= 1e6 else f"{tokens / 1e3:.0f} k"
        money = "" if self.usd is None else f", ${self.usd:.2f}"
        return f"{size} tokens{money}, {format_duration(3600 * self.hours)}"


class Budget:
    """Counts what is spent. A resumed run starts from what it spent before.

    `price` is the price of the model that is asked at the moment.
    """

    def __init__(self, cost: CostRecipe, spent_usd: float = 0.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.cost, self.price, self.usd = cost, cost.teacher_price, spent_usd
        self._clock, self._started = clock, clock()
        self._n, self._n_prompt, self._n_completion, self._own_usd = 0, 0, 0, 0.0

    def record(self, completion: Completion) -> float | None:
        """Count one sample's tokens, lost attempts included; return what it cost in dollars, None without a price."""
        n_prompt = completion.prompt_tokens + completion.lost_tokens[0]
        n_completion = completion.completion_tokens + completion.lost_tokens[1]
        self._n += 1
        self._n_prompt += n_prompt
        self._n_completion += n_completion
        if self.price is None:
            return None
        cost = self.price.of(n_prompt, n_completion)
        self.usd += cost
        self._own_usd += cost
        return cost

    def why_stop(self, n_in_flight: int, most_tokens: int = 0) -> str | None:
        """Return why no further sample may be asked for now, or None if one may.

        Requests in flight are charged at the mean cost so far, at first at the cost of `most_tokens` of an answer: the
        limit is exceeded by no more than what they cost beyond that. Cheaper answers make room again, so a reason is
        final only when nothing is in flight.
        """
        cost = self.cost
        first = self.price.of(0, most_tokens) if self.price else 0.0
        expected = n_in_flight * (self._own_usd / self._n if self._n else first)
        if cost.max_usd is not None and self.usd + expected >= cost.max_usd:
            return f"the ${cost.max_usd:g} of --max-usd are spent"
        if cost.max_hours is not None and self._clock() - self._started >= 3600 * cost.max_hours:
            return f"the {cost.max_hours:g} hours of --max-hours are over"
        return None

    def project(self, n_left: int) -> Projection | None:
        """Return what the samples so far and n_left more will take; None until there are enough to judge from."""
        if self._n < _JUDGED_FROM:
            return None
        more, seconds = n_left / self._n, self._clock() - self._started
        usd = None if self.cost.price is None else self.usd + more * self._own_usd
        return Projection(
            n_prompt=self._n_prompt * (1 + more),
            n_completion=self._n_completion * (1 + more),
            usd=usd,
            hours=seconds * (1 + more) / 3600,
        )
