"""The loop that asks a teacher until everything wanted has come, the budget is spent, or nothing can succeed any more.

Samples of problems (traces/collect.py) and requests that are asked once (ask_once.py) differ in what they want and in
where an answer goes: that is what an `Asking` says.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar

from ...localrun.core.generation import Completion, Sampling
from ..records import Request
from .base import Teacher
from .budget import Budget

T = TypeVar("T")


class Asking(Protocol[T]):
    """What there is to ask. An item stands for one request."""

    def wanted(self) -> Iterator[T]:
        """Yield the items to ask for as things are when each is drawn. This changes nothing."""
        ...

    def begin(self, item: T) -> Request:
        """Count an item as in flight, and return its request."""
        ...

    def end(self, item: T, completion: Completion, cost_usd: float | None) -> None:
        """Take an answer, or a failure that is final (`finish_reason` "error"), and what it cost in dollars."""
        ...


@dataclass(frozen=True)
class Asked:
    """How many requests ended, and how many of them failed. `stopped` says why some were not asked, if so."""

    n_asked: int
    n_failed: int
    stopped: str | None


def ask_all(teacher: Teacher, asking: Asking[T], *, sampling: Sampling, budget: Budget, top_logprobs: int = 0) -> Asked:
    """Ask for everything that is wanted, until nothing is wanted any more or the budget is spent.

    Raises:
        TeacherError: no request can succeed any more; every earlier answer was taken.
    """
    n_asked = n_failed = 0
    drawn: list[T] = []

    def requests() -> Iterator[Request]:
        for item in asking.wanted():
            if budget.why_stop(len(drawn) - n_asked, sampling.max_tokens):
                return  # for now: answers that cost less than expected make room, and another pass finds the item
            drawn.append(item)
            yield asking.begin(item)

    stopped, n_before = budget.why_stop(0), -1
    while not stopped and len(drawn) > n_before and next(asking.wanted(), None) is not None:
        n_before = len(drawn)
        for index, completion in teacher.generate(requests(), sampling, top_logprobs=top_logprobs):
            n_asked += 1
            n_failed += completion.finish_reason == "error"
            asking.end(drawn[n_before + index], completion, budget.record(completion))
        stopped = budget.why_stop(0)
    if stopped and next(asking.wanted(), None) is None:
        stopped = None  # the budget is spent, and everything has come
    return Asked(n_asked, n_failed, stopped)
