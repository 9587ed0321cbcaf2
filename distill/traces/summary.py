"""What is in a traces file or a run folder: counts, verdicts, lengths, cost, the worst examples. One pass."""

from __future__ import annotations

import heapq
import json
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import ArtifactError, UsageError
from ...localrun.core.record_log import parse_line, whole_lines
from ..records import Trace
from ..run import find_run
from .logprobs import logprobs_path
from .store import TraceStore, verdicts_path

_N_EXAMPLES = 3
_MAX_SOURCES = 50  # the rest is counted together, so that memory stays bounded


@dataclass(frozen=True)
class Example:
    """A trace worth a look: `number` counts the file's distinct traces from 1, `length` is in tokens or characters."""

    number: int
    id: str
    question: str
    length: int
    finish_reason: str


@dataclass
class TraceReport:
    """What `inspect_traces` found. Lengths are completion tokens, or characters where no trace says its tokens."""

    path: Path
    n_bytes: int = 0
    n_traces: int = 0
    verdicts: Counter[str] = field(default_factory=Counter)
    verdict_by: Counter[str] = field(default_factory=Counter)
    finish_reasons: Counter[str] = field(default_factory=Counter)
    teachers: Counter[str] = field(default_factory=Counter)
    sources: dict[str, Counter[str]] = field(default_factory=dict)
    """Verdicts by source of the problem."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    seconds: float = 0.0
    """Of all requests together, though many ran at once."""
    cost_usd: float | None = None
    """Of the traces that say it; None: none does."""
    n_logprobs: int = 0
    """Traces with log-probabilities in the sidecar."""
    lengths: array[int] = field(default_factory=lambda: array("l"))
    n_characters: array[int] = field(default_factory=lambda: array("l"))
    examples: dict[str, list[Example]] = field(default_factory=dict)
    """The longest of each kind: `longest`, `wrong`, `cut` (length or loop)."""

    @property
    def unit(self) -> str:
        """What lengths are counted in."""
        return "tokens" if self.completion_tokens else "characters"

    def quantile(self, share: float) -> int:
        """Return the length that this share of the traces does not exceed; 0 without traces."""
        ordered = sorted(self.lengths)
        return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else 0

    def histogram(self, n_bins: int = 12) -> list[tuple[int, int, int]]:
        """Return (from, to, count) of bins as wide as each other, the last one to the longest trace."""
        if not self.lengths:
            return []
        low, high = min(self.lengths), max(self.lengths)
        width = max(1, -(-(high - low + 1) // n_bins))
        counts = Counter((length - low) // width for length in self.lengths)
        return [
            (low + i * width, min(low + (i + 1) * width - 1, high), counts[i]) for i in range((high - low) // width + 1)
        ]

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON has it."""
        quantiles = {name: self.quantile(share) for name, share in (("p10", 0.1), ("median", 0.5), ("p90", 0.9))}
        return {
            "path": str(self.path),
            "bytes": self.n_bytes,
            "traces": self.n_traces,
            "verdicts": dict(self.verdicts),
            "verdict_by": dict(self.verdict_by),
            "finish_reasons": dict(self.finish_reasons),
            "teachers": dict(self.teachers.most_common()),
            "sources": {source: dict(verdicts) for source, verdicts in self.sources.items()},
            "tokens": {
                "prompt": self.prompt_tokens,
                "completion": self.completion_tokens,
                "reasoning": self.reasoning_tokens,
            },
            "seconds": round(self.seconds, 3),
            "cost_usd": self.cost_usd,
            "with_logprobs": self.n_logprobs,
            "lengths": {"unit": self.unit, **quantiles, "max": max(self.lengths, default=0)},
            "histogram": [{"from": low, "to": high, "n": n} for low, high, n in self.histogram()],
            "examples": {kind: [vars(one) for one in found] for kind, found in self.examples.items()},
        }


def inspect_traces(path: Path) -> TraceReport:
    """Read a traces file once and return what is in it. In memory are an id and two lengths a trace.

    Raises:
        ArtifactError: the file is missing or broken.
    """
    report = TraceReport(path)
    worst: dict[str, list[tuple[int, int, Example]]] = {"longest": [], "wrong": [], "cut": []}
    for number, trace in enumerate(TraceStore.read(path), 1):
        _count(report, trace)
        for kind in _kinds(trace):
            length = trace.usage.completion or _n_characters(trace)
            example = Example(number, trace.id, _question(trace), length, trace.finish_reason)
            heapq.heappush(worst[kind], (length, -number, example))
            if len(worst[kind]) > _N_EXAMPLES:
                heapq.heappop(worst[kind])
    if not report.completion_tokens:
        report.lengths = report.n_characters
    sidecars = (path, verdicts_path(path), logprobs_path(path))
    report.n_bytes = sum(file.stat().st_size for file in sidecars if file.exists())
    report.examples = {kind: [one for *_, one in sorted(found, reverse=True)] for kind, found in worst.items() if found}
    return report


def _count(report: TraceReport, trace: Trace) -> None:
    report.n_traces += 1
    report.verdicts[trace.verdict] += 1
    report.verdict_by[trace.verdict_by] += 1
    report.finish_reasons[trace.finish_reason] += 1
    report.teachers[f"{trace.teacher.name} ({trace.teacher.backend})"] += 1
    source = trace.source or "unknown"
    if source not in report.sources and len(report.sources) >= _MAX_SOURCES:
        source = "other"
    report.sources.setdefault(source, Counter())[trace.verdict] += 1
    report.prompt_tokens += trace.usage.prompt
    report.completion_tokens += trace.usage.completion
    report.reasoning_tokens += trace.usage.reasoning
    report.seconds += trace.seconds
    if trace.cost_usd is not None:
        report.cost_usd = (report.cost_usd or 0.0) + trace.cost_usd
    report.n_logprobs += trace.n_logprobs > 0
    report.lengths.append(trace.usage.completion)
    report.n_characters.append(_n_characters(trace))


def _kinds(trace: Trace) -> Iterator[str]:
    yield "longest"
    if trace.verdict == "wrong":
        yield "wrong"
    if trace.finish_reason in ("length", "loop"):
        yield "cut"


def _n_characters(trace: Trace) -> int:
    return len(trace.reasoning_content or "") + len(trace.content)


def _question(trace: Trace) -> str:
    """Return the beginning of what was asked, on one line."""
    asked = next((m["content"] for m in reversed(trace.messages) if m["role"] == "user"), "")
    return " ".join(asked[:400].split())[:100]


def find_trace(path: Path, which: str) -> Trace:
    """Return a trace by its number from 1, or by its id or how that begins (at least 4 characters).

    Raises:
        UsageError: there is no such trace, or several begin so.
        ArtifactError: the file is missing or broken.
    """
    is_number = which.isdecimal() and len(which) < 10
    found: list[Trace] = []
    for number, trace in enumerate(TraceStore.read(path), 1) if is_number else ():
        if number == int(which):
            return trace
    if len(which) >= 4:
        # Our lines begin with the id: the others need no parsing.
        lines = ((number, line) for number, line in whole_lines(path) if which.encode() in line[:200])
        ids = {t.id for t in (parse_line(Trace, path, *one) for one in lines) if t.id.startswith(which)}
        if len(ids) > 1:
            raise UsageError(
                f"{len(ids)} traces begin with {which}: {', '.join(sorted(ids)[:3])}", "give more of the id"
            )
        found = [trace for trace in TraceStore.read(path) if trace.id in ids] if ids else []
    if not found:
        raise UsageError(f"{path} has no trace {which}", "give a number from 1, or the beginning of an id")
    return found[0]


def inspect_run(folder: Path) -> dict[str, Any]:
    """Return what a run folder holds: its recipe, artifacts with their sizes in bytes, curation, scores, traces.

    Raises:
        ArtifactError: it is no run folder, or a file in it is broken.
    """
    if find_run(folder) != folder:
        raise ArtifactError(f"{folder} is no run folder: it has no recipe.json")
    found: dict[str, Any] = {"path": str(folder)}
    for name in ("recipe", "curation", "training", "scores"):
        path = folder / f"{name}.json"
        try:
            found[name] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        except (OSError, ValueError) as error:
            raise ArtifactError(f"{path} is broken: {error}") from error
    shown = (path for path in sorted(folder.iterdir()) if not path.name.startswith("."))
    found["artifacts"] = {path.name: _n_bytes(path) for path in shown}
    traces = folder / "traces.jsonl"
    found["traces"] = inspect_traces(traces).to_json() if traces.exists() else None
    return found


def _n_bytes(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
