"""What a file of traces holds, found in one pass: verdicts by source, lengths, cost, speed, and a fair sample to read.

A million traces take a few arrays of numbers; the sample is drawn by reservoir, the same for the same file.
"""

from __future__ import annotations

import random
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Self

import numpy as np

from ..evaluation.charts import Chart, histogram, over_time
from ..records import Trace

GROUPS = ("right", "wrong", "unknown")
COLUMNS = ("right", "wrong", "vote", "judge", "unknown")
"""How a trace was judged: `vote` and `judge` favour an answer that no grader could judge."""


def judged(trace: Trace) -> str:
    """Return which of COLUMNS a trace belongs to."""
    return trace.verdict_by if trace.verdict == "unknown" and trace.verdict_by in COLUMNS else trace.verdict


class Overview:
    """Counts and numbers of the traces that it was given."""

    def __init__(self, n_sample: int = 60, seed: int = 0) -> None:
        self.n_traces = 0
        self.verdicts: dict[str, Counter[str]] = defaultdict(Counter)
        self.finish: Counter[str] = Counter()
        self._n_sample, self._random = n_sample, random.Random(seed)
        self._problems: set[str] = set()
        self._sample: dict[str, list[tuple[int, Trace]]] = {group: [] for group in GROUPS}
        self._seen: Counter[str] = Counter()
        self._tokens = {group: array("q") for group in GROUPS}
        self._usd = {group: array("d") for group in GROUPS}
        self._ends, self._ended_tokens = array("d"), array("q")
        self._speeds = array("d")

    @classmethod
    def of(cls, traces: Iterable[Trace]) -> Self:
        """Return the overview of these traces."""
        overview = cls()
        for trace in traces:
            overview.add(trace)
        return overview

    def add(self, trace: Trace) -> None:
        """Take a trace in."""
        self._problems.add(trace.problem_id)
        self.verdicts[trace.source][judged(trace)] += 1
        self.finish[trace.finish_reason] += 1
        self._tokens[trace.verdict].append(trace.usage.completion)
        if trace.cost_usd is not None:
            self._usd[trace.verdict].append(trace.cost_usd)
        if trace.seconds > 0:
            self._speeds.append(trace.usage.completion / trace.seconds)
        created = getattr(trace, "created", None)  # unix seconds
        if created:
            self._ends.append(created)
            self._ended_tokens.append(trace.usage.completion)
        self._draw(trace)
        self.n_traces += 1

    def _draw(self, trace: Trace) -> None:
        """Keep each trace of a verdict with the same chance (Vitter's algorithm R)."""
        sample, seen = self._sample[trace.verdict], self._seen[trace.verdict]
        self._seen[trace.verdict] += 1
        if seen < self._n_sample:
            sample.append((self.n_traces, trace))
        elif (place := self._random.randrange(seen + 1)) < self._n_sample:
            sample[place] = (self.n_traces, trace)

    @property
    def n_problems(self) -> int:
        """Distinct problems."""
        return len(self._problems)

    @property
    def usd(self) -> float | None:
        """What the traces cost in all; None if no price is known."""
        return sum(map(sum, self._usd.values())) if any(self._usd.values()) else None

    @property
    def n_tokens(self) -> int:
        """Tokens that the teacher wrote."""
        return sum(map(sum, self._tokens.values()))

    def sample(self) -> list[Trace]:
        """Return up to `n_sample` traces in the order of the file; each verdict has an equal part where it can."""
        taken: list[tuple[int, Trace]] = []
        groups = sorted(self._sample.values(), key=len)
        for i, group in enumerate(groups):
            room = (self._n_sample - len(taken)) // (len(groups) - i)
            taken += self._random.sample(group, min(room, len(group)))
        return [trace for _, trace in sorted(taken, key=lambda pair: pair[0])]

    def lengths(self) -> Chart | None:
        """Return how long the traces are, in the teacher's tokens."""
        return histogram({group: np.frombuffer(values, np.int64) for group, values in self._tokens.items()}, "tokens")

    def costs(self) -> Chart | None:
        """Return what a trace cost, in dollars; None if no price is known."""
        return histogram({group: np.frombuffer(values) for group, values in self._usd.items()}, "$")

    def throughput(self) -> Chart | None:
        """Return output tokens a second: of all requests together over the time worked, if the traces tell when they
        ended; else of each request, in the order of the file.
        """
        return over_time(np.frombuffer(self._ends), np.frombuffer(self._ended_tokens, np.int64)) or over_time(
            None, np.frombuffer(self._speeds)
        )
