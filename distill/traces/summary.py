"""What a file of traces has: counts, lengths, cost, speed, the worst examples and a fair sample.

One pass, numbers only: show.py prints them, and the run's report draws them. A million traces need a few arrays of
numbers; the sample is drawn by reservoir, always the same for the same file.
"""

from __future__ import annotations

import heapq
import random
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, get_args

from ...localrun.core.text import shorten
from ..records import Trace, Verdict
from .logprobs import logprobs_path
from .store import verdicts_path

VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
JUDGED_AS = ("right", "wrong", "vote", "judge", "unknown")
"""How a trace was judged: `vote` and `judge` favour an answer that no grader could judge."""

_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")
_N_EXAMPLES = 3
_N_SAMPLE = 60
_MAX_SOURCES = 50  # later ones are counted together, so that memory stays bounded


def judged_as(trace: Trace) -> str:
    """Return which of JUDGED_AS a trace belongs to."""
    return trace.verdict_by if trace.verdict == "unknown" and trace.verdict_by in JUDGED_AS else trace.verdict


@dataclass(frozen=True)
class Example:
    """A trace worth a look: `number` counts the file's distinct traces from 1, `length` is in tokens or characters."""

    number: int
    id: str
    question: str
    length: int
    finish_reason: str


class TraceSummary:
    """Counts and numbers of the traces added to it."""

    def __init__(self, path: Path | None = None) -> None:
        """Start empty; `path` is the file that the traces come from, if they come from one."""
        self.path = path
        self.n_traces = 0
        self.verdicts, self.verdict_by = Counter[str](), Counter[str]()
        self.finish_reasons, self.teachers = Counter[str](), Counter[str]()
        self.reasons = Counter[str]()
        """Why graders could not tell, without the texts that differ from trace to trace."""
        self.sources: dict[str, Counter[str]] = {}
        """Counts of JUDGED_AS by the source of the problem, "" if it is not known."""
        self.prompt_tokens = self.reasoning_tokens = 0
        self.seconds = 0.0
        """Of all requests together, although many ran at once."""
        self.n_logprobs = 0
        """Traces with log-probabilities in the sidecar."""
        self.tokens: dict[str, array[int]] = {verdict: array("q") for verdict in VERDICTS}
        """Completion tokens of each trace, by verdict."""
        self.usd: dict[str, array[float]] = {verdict: array("d") for verdict in VERDICTS}
        """Cost of each trace that says it, by verdict."""
        self.n_characters = array("q")
        self.speeds = array("d")
        """Completion tokens/s of each request."""
        self.end_times, self.end_tokens = array("d"), array("q")
        """When each request ended, in Unix seconds, and its completion tokens, where the trace says it."""
        self._problems: set[str] = set()
        self._longest: dict[str, list[tuple[int, int, Example]]] = {"longest": [], "wrong": [], "cut": []}
        self._sample = _Sample()

    @classmethod
    def of(cls, traces: Iterable[Trace], path: Path | None = None) -> Self:
        """Return the summary of these traces."""
        summary = cls(path)
        for trace in traces:
            summary.add(trace)
        return summary

    def add(self, trace: Trace) -> None:
        """Count a trace in."""
        self.n_traces += 1
        self._problems.add(trace.problem_id)
        self._count(trace)
        usage = trace.usage
        self.prompt_tokens += usage.prompt
        self.reasoning_tokens += usage.reasoning
        self.tokens[trace.verdict].append(usage.completion)
        self.n_characters.append(len(trace.reasoning_content or "") + len(trace.content))
        self.seconds += trace.seconds
        self.n_logprobs += trace.n_logprobs > 0
        if trace.cost_usd is not None:
            self.usd[trace.verdict].append(trace.cost_usd)
        if trace.seconds > 0:
            self.speeds.append(usage.completion / trace.seconds)
        if trace.created:
            self.end_times.append(trace.created)
            self.end_tokens.append(usage.completion)
        self._keep_longest(trace)
        self._sample.add(self.n_traces, trace)

    def _count(self, trace: Trace) -> None:
        self.verdicts[trace.verdict] += 1
        self.verdict_by[trace.verdict_by] += 1
        self.finish_reasons[trace.finish_reason] += 1
        if trace.reason and trace.verdict == "unknown":
            self.reasons[_QUOTED.sub("…", trace.reason)] += 1
        self.teachers[f"{trace.teacher.name} ({trace.teacher.backend})"] += 1
        is_over = trace.source not in self.sources and len(self.sources) >= _MAX_SOURCES
        self.sources.setdefault("other" if is_over else trace.source, Counter())[judged_as(trace)] += 1

    def _keep_longest(self, trace: Trace) -> None:
        length = trace.usage.completion or self.n_characters[-1]
        for kind in _kinds(trace):
            heap = self._longest[kind]
            if len(heap) == _N_EXAMPLES and (length, -self.n_traces) < heap[0][:2]:
                continue
            question = next((m["content"] for m in reversed(trace.messages) if m["role"] == "user"), "")
            example = Example(self.n_traces, trace.id, shorten(question, 100), length, trace.finish_reason)
            heapq.heappush(heap, (length, -self.n_traces, example))
            if len(heap) > _N_EXAMPLES:
                heapq.heappop(heap)

    @property
    def n_bytes(self) -> int:
        """The size of the file with its sidecars."""
        files = (self.path, verdicts_path(self.path), logprobs_path(self.path)) if self.path else ()
        return sum(file.stat().st_size for file in files if file.exists())

    @property
    def n_problems(self) -> int:
        """Distinct problems."""
        return len(self._problems)

    @property
    def completion_tokens(self) -> int:
        """Tokens that the teachers wrote."""
        return sum(map(sum, self.tokens.values()))

    @property
    def cost_usd(self) -> float | None:
        """Cost of the traces that say it; None if none does."""
        return sum(map(sum, self.usd.values())) if any(self.usd.values()) else None

    @property
    def unit(self) -> str:
        """The unit of `lengths`: tokens, or characters if no trace says its tokens."""
        return "tokens" if self.completion_tokens else "characters"

    @property
    def lengths(self) -> list[int]:
        """The length of each trace in `unit`, ascending."""
        parts = self.tokens.values() if self.completion_tokens else [self.n_characters]
        return sorted(length for part in parts for length in part)

    @property
    def examples(self) -> dict[str, list[Example]]:
        """The longest traces of each kind: `longest`, `wrong`, `cut` (off at the limit, or in a loop)."""
        return {kind: [one for *_, one in sorted(heap, reverse=True)] for kind, heap in self._longest.items() if heap}

    def verdicts_by_source(self) -> dict[str, Counter[str]]:
        """Return counts of right, wrong and unknown by source; "unknown" is also the source of traces without one."""
        found: dict[str, Counter[str]] = {}
        for source, counts in self.sources.items():
            verdicts = found.setdefault(source or "unknown", Counter())
            for name, count in counts.items():
                verdicts[name if name in VERDICTS else "unknown"] += count
        return found

    def sample(self) -> list[Trace]:
        """Return up to 60 traces in the order of the file, an equal part of each verdict if there are enough."""
        return self._sample.take()

    def histogram(self, n_bins: int = 12) -> list[tuple[int, int, int]]:
        """Return (from, to, count) of up to `n_bins` equally wide ranges of `lengths`."""
        lengths = self.lengths
        if not lengths:
            return []
        low, high = lengths[0], lengths[-1]
        width = max(1, -(-(high - low + 1) // n_bins))
        counts = Counter((length - low) // width for length in lengths)
        return [
            (low + i * width, min(low + (i + 1) * width - 1, high), counts[i]) for i in range((high - low) // width + 1)
        ]

    def to_json(self) -> dict[str, Any]:
        """Return the numbers as a JSON object."""
        lengths = self.lengths
        return {
            "path": str(self.path),
            "bytes": self.n_bytes,
            "traces": self.n_traces,
            "verdicts": dict(self.verdicts),
            "verdict_by": dict(self.verdict_by),
            "finish_reasons": dict(self.finish_reasons),
            "reasons": dict(self.reasons.most_common(10)),
            "teachers": dict(self.teachers.most_common()),
            "sources": {source: dict(counts) for source, counts in self.verdicts_by_source().items()},
            "tokens": {
                "prompt": self.prompt_tokens,
                "completion": self.completion_tokens,
                "reasoning": self.reasoning_tokens,
            },
            "seconds": round(self.seconds, 3),
            "cost_usd": self.cost_usd,
            "with_logprobs": self.n_logprobs,
            "lengths": {
                "unit": self.unit,
                "p10": quantile(lengths, 0.1),
                "median": quantile(lengths, 0.5),
                "p90": quantile(lengths, 0.9),
                "max": lengths[-1] if lengths else 0,
            },
            "histogram": [{"from": low, "to": high, "n": n} for low, high, n in self.histogram()],
            "examples": {kind: [vars(one) for one in found] for kind, found in self.examples.items()},
        }


def quantile(ordered: list[int], share: float) -> int:
    """Return the number that this share of ascending ones does not exceed; 0 without numbers."""
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else 0


class _Sample:
    """A random sample of traces, reproducible: each trace of a verdict has the same chance (Vitter's algorithm R)."""

    def __init__(self) -> None:
        self._random = random.Random(0)
        self._seen: Counter[str] = Counter()
        self._kept: dict[str, list[tuple[int, Trace]]] = {verdict: [] for verdict in VERDICTS}

    def add(self, number: int, trace: Trace) -> None:
        kept, n_seen = self._kept[trace.verdict], self._seen[trace.verdict]
        self._seen[trace.verdict] += 1
        if n_seen < _N_SAMPLE:
            kept.append((number, trace))
        elif (place := self._random.randrange(n_seen + 1)) < _N_SAMPLE:
            kept[place] = (number, trace)

    def take(self) -> list[Trace]:
        taken: list[tuple[int, Trace]] = []
        groups = sorted(self._kept.values(), key=len)
        for i, group in enumerate(groups):
            room = (_N_SAMPLE - len(taken)) // (len(groups) - i)
            taken += self._random.sample(group, min(room, len(group)))
        return [trace for _, trace in sorted(taken, key=lambda pair: pair[0])]


def _kinds(trace: Trace) -> Iterator[str]:
    yield "longest"
    if trace.verdict == "wrong":
        yield "wrong"
    if trace.finish_reason in ("length", "loop"):
        yield "cut"
