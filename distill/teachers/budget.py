"""What a run may cost, when it has to stop, and what it will cost in all, judged from its samples so far."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from ...errors import UsageError
from ...localrun.core.generation import Completion
from ...localrun.core.text import format_duration

_JUDGED_FROM = 20  # samples: fewer say little about the rest


@dataclass(frozen=True)
class Price:
    """US dollars for a million tokens."""

    prompt: float
    completion: float

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the price that `IN,OUT` names.

        Raises:
            UsageError: it is not two numbers.
        """
        try:
            prompt, completion = (float(part) for part in text.split(","))
        except ValueError:
            raise UsageError(
                f"{text!r} is not a price", "write IN,OUT in dollars a million tokens: 0.55,2.19", code="bad-price"
            ) from None
        if not (0 <= prompt < 1e6 and 0 <= completion < 1e6):
            raise UsageError(
                f"{text!r} is not a price", "write IN,OUT in dollars a million tokens: 0.55,2.19", code="bad-price"
            )
        return cls(prompt, completion)

    def of(self, n_prompt: int, n_completion: int) -> float:
        """Return what so many tokens cost, in dollars."""
        return (n_prompt * self.prompt + n_completion * self.completion) / 1e6


@dataclass(frozen=True)
class Limits:
    """What the traces of a run may cost: dollars in all, hours a command. None: as much as it takes.

    `judge_price` is for a judge that is not the teacher; without it a server's tokens cost what the teacher's do.
    """

    price: Price | None = None
    max_usd: float | None = None
    max_hours: float | None = None
    judge_price: Price | None = None

    def __post_init__(self) -> None:
        if self.max_usd is not None and self.price is None:
            raise UsageError(
                "--max-usd needs the teacher's price",
                "give --price IN,OUT in dollars a million tokens",
                code="price-missing",
            )

    def price_of_judge(self, judge: str | None, teacher: str) -> Price | None:
        """Return what a judge's tokens cost: nothing in this process, unless a price is given; None if not known."""
        if judge is None or judge == teacher:
            return self.judge_price or self.price
        is_here = not judge.startswith(("http://", "https://"))
        return self.judge_price or (Price(0.0, 0.0) if is_here and self.price else self.price)


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

    def __init__(self, limits: Limits, spent_usd: float = 0.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.limits, self.price, self.usd = limits, limits.price, spent_usd
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
        limits = self.limits
        first = self.price.of(0, most_tokens) if self.price else 0.0
        expected = n_in_flight * (self._own_usd / self._n if self._n else first)
        if limits.max_usd is not None and self.usd + expected >= limits.max_usd:
            return f"the ${limits.max_usd:g} of --max-usd are spent"
        if limits.max_hours is not None and self._clock() - self._started >= 3600 * limits.max_hours:
            return f"the {limits.max_hours:g} hours of --max-hours are over"
        return None

    def project(self, n_left: int) -> Projection | None:
        """Return what the samples so far and n_left more will take; None until there are enough to judge from."""
        if self._n < _JUDGED_FROM:
            return None
        more, seconds = n_left / self._n, self._clock() - self._started
        usd = None if self.limits.price is None else self.usd + more * self._own_usd
        return Projection(
            n_prompt=self._n_prompt * (1 + more),
            n_completion=self._n_completion * (1 + more),
            usd=usd,
            hours=seconds * (1 + more) / 3600,
        )
