"""Measure how fast a GGUF runs on this machine, and how near that comes to the limit of the memory's bandwidth.

Prefill reads the weights once for hundreds of tokens, so arithmetic limits it. Decoding reads all active weights and
the sequence's KV cache for every token, so bandwidth limits it: a rate's share of that limit shows how much there is
left to gain. Sequences decoded together share one read of the weights. As in llama-bench, the tokens are random and
nothing is sampled; a warm-up is discarded, and the report gives the median of the trials and their spread.
"""

from __future__ import annotations

import dataclasses
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil  # type: ignore[import-untyped]
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .core.printable import facts_table
from .core.reporter import SILENT, Reporter
from .core.text import format_bytes
from .engine.llama import Context, Entry, Model
from .machine import hardware
from .machine.memory import KV_TYPES, N_BATCH, Footprint, fit_context, flash_attention

Phase = Literal["prefill", "decode"]


@dataclass(frozen=True)
class Point:
    """One measured rate.

    `tokens_per_s` counts all sequences together and is the median of the trials; `spread` is (fastest - slowest) over
    that. `limit_share` is its share of what the bandwidth allows, for phases that it limits.
    """

    phase: Phase
    kv_type: str
    n_seq: int
    depth: int  # tokens that each sequence's cache holds before
    n_tokens: int  # per trial and sequence
    n_trials: int
    tokens_per_s: float
    spread: float
    limit_share: float | None


@dataclass(frozen=True)
class MemoryUse:
    """Bytes with one KV type: the cache, this process after using it, and the estimate of `fit_context`."""

    kv_type: str
    n_ctx: int
    kv_bytes: int
    resident_bytes: int
    estimated_bytes: int


@dataclass(frozen=True)
class BenchReport:
    """How a file performs on this machine; times in seconds, sizes in bytes, bandwidth in bytes/s."""

    path: Path
    file_bytes: int
    cpu: str
    n_threads: int
    bandwidth: float
    load_s: float
    first_token_s: float
    """From a prompt of `n_prompt` tokens to the first token, with the model in memory."""
    n_prompt: int
    points: tuple[Point, ...]
    memory: tuple[MemoryUse, ...]
    notes: tuple[str, ...] = ()

    @property
    def peak_bytes(self) -> int:
        """The most memory that this process held after any measurement."""
        return max((use.resident_bytes for use in self.memory), default=0)

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON's types."""
        return dataclasses.asdict(self) | {"path": str(self.path), "peak_bytes": self.peak_bytes}


@dataclass(frozen=True)
class BenchSettings:
    """What to measure.

    Prefill and decoding are measured with one sequence at each depth, decoding with several at the first depth too.
    """

    depths: tuple[int, ...] = (0, 512, 2048)
    batch_sizes: tuple[int, ...] = (1, 4, 16)
    kv_types: tuple[str, ...] = tuple(KV_TYPES)
    n_prompt: int = 512
    n_tokens: int = 32
    n_trials: int = 5

    def fitted(self, footprint: Footprint) -> tuple[BenchSettings, list[str]]:
        """Return the settings without what a model cannot do, and a note for each thing left out."""
        n_ctx = footprint.n_ctx_train or max(self.depths) + self.n_prompt
        n_prompt = min(self.n_prompt, n_ctx)
        n_tokens = min(self.n_tokens, n_ctx)
        depths = tuple(depth for depth in self.depths if depth + max(n_prompt, n_tokens) <= n_ctx) or (0,)
        kv_types = tuple(kv_type for kv_type in self.kv_types if kv_type in footprint.kv_types()) or ("f16",)
        notes = []
        if left_out := [str(depth) for depth in self.depths if depth not in depths]:
            notes.append(f"depth {', '.join(left_out)} is left out: its context holds {n_ctx} tokens")
        if left_out := [kv_type for kv_type in self.kv_types if kv_type not in kv_types]:
            notes.append(f"{', '.join(left_out)} is left out: its heads' width is not a multiple of the block")
        settings = dataclasses.replace(self, depths=depths, kv_types=kv_types, n_prompt=n_prompt, n_tokens=n_tokens)
        return settings, notes

    @property
    def n_seq(self) -> int:
        """The largest batch."""
        return max(1, *self.batch_sizes)

    @property
    def n_ctx(self) -> int:
        """The cells that the longest sequence and the largest batch need."""
        longest = max(self.depths) + max(self.n_prompt, self.n_tokens)
        return max(longest, self.n_seq * (self.depths[0] + self.n_tokens))

    @property
    def n_points(self) -> int:
        """How many rates are measured."""
        return len(self.kv_types) * (2 * len(self.depths) + sum(n > 1 for n in self.batch_sizes))


QUICK = BenchSettings((0, 512), (1, 4), ("f16",), n_prompt=256, n_tokens=16, n_trials=3)


def bench(
    path: Path,
    settings: BenchSettings = BenchSettings(),
    *,
    n_threads: int | None = None,
    patience_s: float = 20.0,
    report: Reporter = SILENT,
) -> BenchReport:
    """Measure a file, leaving out what its context or its heads do not allow, with a note.

    n_threads None measures the best thread count again, and keeps it. After `patience_s` seconds a point gets no more
    trials: a large model has fewer of them, never none.

    Raises:
        ArtifactError, ModelError: see `Footprint.of`, `fit_context` and `llama.Model`.
    """
    footprint = Footprint.of(path)
    settings, notes = settings.fitted(footprint)
    for kv_type in settings.kv_types:
        fit_context(footprint, kv_type, wanted=settings.n_ctx)
    report.progress("bench", 0, total=settings.n_points, note="bandwidth")
    bandwidth = hardware.memory_bandwidth()
    started = time.monotonic()
    points: list[Point] = []
    memory = []
    with Model(path) as model:
        load_s = time.monotonic() - started
        n_threads = n_threads or hardware.best_threads(path, lambda n: seconds_per_token(model, n), remeasure=True)
        for kv_type in settings.kv_types:
            run = _Run(model, settings, footprint, kv_type, n_threads, bandwidth, patience_s)
            for point in run.points():
                points.append(point)
                note = f"{point.phase} {point.tokens_per_s:.0f} tokens/s, {kv_type}"
                report.progress("bench", len(points), total=settings.n_points, note=note)
            memory.append(run.memory_use())
    return BenchReport(
        path=path,
        file_bytes=path.stat().st_size,
        cpu=hardware.cpu_name(),
        n_threads=n_threads,
        bandwidth=bandwidth,
        load_s=load_s,
        first_token_s=settings.n_prompt / points[0].tokens_per_s,
        n_prompt=settings.n_prompt,
        points=tuple(points),
        memory=tuple(memory),
        notes=tuple(notes),
    )


@dataclass
class _Run:
    """The measurements with one KV type: of one sequence as the engine runs it, then of several in one cache."""

    model: Model
    settings: BenchSettings
    footprint: Footprint
    kv_type: str
    n_threads: int
    bandwidth: float  # bytes/s
    patience_s: float
    resident_bytes: int = 0
    n_cells: int = 0

    def points(self) -> Iterator[Point]:
        with self._opened(1):
            for depth in self.settings.depths:
                yield self._prefill_at(depth)
                yield self._decode_at(depth, 1)
        several = [n_seq for n_seq in self.settings.batch_sizes if n_seq > 1]
        if several:
            with self._opened(max(several)):
                yield from (self._decode_at(self.settings.depths[0], n_seq) for n_seq in several)

    @contextmanager
    def _opened(self, n_seq: int) -> Iterator[None]:
        n_ctx, self.n_seq = self.settings.n_ctx, n_seq
        flash = flash_attention(self.footprint, n_ctx, kv_type=self.kv_type) if n_seq == 1 else None
        n_batch = max(N_BATCH, n_seq)
        with Context(
            self.model, n_ctx, n_seq=n_seq, n_batch=n_batch, kv_type=self.kv_type, flash=flash
        ) as self.context:
            self.context.set_threads(self.n_threads)
            yield
            self.n_cells = self.context.n_ctx
            self.resident_bytes = max(self.resident_bytes, int(psutil.Process().memory_info().rss))

    def _prefill_at(self, depth: int) -> Point:
        n = self.settings.n_prompt
        seconds = self._time(depth, 1, lambda: prefill(self.context, 0, start=depth, n_tokens=n))
        return self._point("prefill", seconds, n_seq=1, depth=depth, n_tokens=n)

    def _decode_at(self, depth: int, n_seq: int) -> Point:
        n = self.settings.n_tokens
        seconds = self._time(depth, n_seq, lambda: decode(self.context, n_seq, start=depth, n_tokens=n))
        cached_bytes = n_seq * (depth + n / 2) * self.footprint.kv_bytes_per_token(self.kv_type)
        limit = n_seq * self.bandwidth / (self.footprint.read_bytes + cached_bytes)
        return self._point("decode", seconds, n_seq=n_seq, depth=depth, n_tokens=n, limit=limit)

    def _time(self, depth: int, n_seq: int, work: Callable[[], None]) -> list[float]:
        """Return the seconds of each trial, every sequence being `depth` tokens long before it."""
        seconds: list[float] = []
        began = time.monotonic()
        for trial in range(1 + self.settings.n_trials):
            for sequence in range(self.n_seq):
                wanted = depth if sequence < n_seq else 0
                held = self.context.forget(sequence, wanted)
                prefill(self.context, sequence, start=held, n_tokens=wanted - held)
            started = time.monotonic()
            work()
            if trial > 0:
                seconds.append(time.monotonic() - started)
            if seconds and time.monotonic() - began > self.patience_s:
                break
        return seconds

    def _point(
        self,
        phase: Phase,
        seconds: list[float],
        *,
        n_seq: int,
        depth: int,
        n_tokens: int,
        limit: float | None = None,
    ) -> Point:
        rates = [n_seq * n_tokens / taken for taken in seconds]
        rate = statistics.median(rates)
        share = None if limit is None else rate / limit
        spread = (max(rates) - min(rates)) / rate
        return Point(phase, self.kv_type, n_seq, depth, n_tokens, len(rates), rate, spread, share)

    def memory_use(self) -> MemoryUse:
        return MemoryUse(
            self.kv_type,
            self.n_cells,
            self.n_cells * self.footprint.kv_bytes_per_token(self.kv_type),
            self.resident_bytes,
            self.footprint.total_bytes(self.n_cells, self.kv_type),
        )


def prefill(context: Context, sequence: int, *, start: int, n_tokens: int) -> None:
    """Add random tokens to a sequence, in batches as large as the context takes, and ask for the last one's logits."""
    if n_tokens:
        context.logits(context.run([_token(context) for _ in range(n_tokens)], start, sequence=sequence))


def decode(context: Context, n_seq: int, *, start: int, n_tokens: int) -> None:
    """Add random tokens to several sequences, one to each at a time."""
    for at in range(start, start + n_tokens):
        is_room = context.decode([Entry(_token(context), at, sequence, True) for sequence in range(n_seq)])
        assert is_room, "the context is too small for the measurement"
        context.logits(n_seq - 1)  # waits until the device has finished


def seconds_per_token(model: Model, n_threads: int) -> float:
    """Return how long one sequence's next token takes: `hardware.best_threads` compares thread counts by it."""
    with Context(model, 256, n_batch=1) as context:
        context.set_threads(n_threads)
        decode(context, 1, start=0, n_tokens=1)  # the first token reads the file and starts the threads
        started = time.monotonic()
        for n in range(1, 9):
            decode(context, 1, start=n, n_tokens=1)
            if time.monotonic() - started > 1:  # a large model, or threads that wait for one another
                break
        return (time.monotonic() - started) / n


def _token(context: Context) -> int:
    return random.randrange(context.model.n_vocab)


def print_bench(report: BenchReport, console: Console) -> None:
    """Print the report, readable at 60 columns and without colour."""
    threads = f"{report.n_threads} thread{'s' if report.n_threads > 1 else ''}"
    facts = {
        "model": f"{report.path.name}, {format_bytes(report.file_bytes)}",
        "machine": f"{report.cpu}, {threads}, reads {report.bandwidth / 1e9:.1f} GB/s",
        "loading": f"{report.load_s:.2f} s",
        "first token": f"{report.first_token_s:.2f} s after a prompt of {report.n_prompt} tokens",
        "memory": f"{format_bytes(report.peak_bytes)} at most, including this program's own",
    }
    console.print(facts_table(facts.items()))
    console.print()
    console.print(_rates(report))
    for use in report.memory:
        cache = f"{use.kv_type}: {use.n_ctx} tokens of KV cache take {format_bytes(use.kv_bytes)}"
        console.print(Text(f"{cache}, the process {format_bytes(use.resident_bytes)}"))
    for note in report.notes:
        console.print(Text(f"note: {note}"))
    explained = (
        "limit: the share of the rate at which the bandwidth reads all active weights and the cache for every token"
    )
    console.print(Text(f"\n{explained}", style="dim"))


def _rates(report: BenchReport) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("KV")
    table.add_column("phase")
    for name in ("depth", "batch", "tokens/s", "±", "limit"):
        table.add_column(name, justify="right", no_wrap=True)
    before = None
    for point in report.points:
        if before not in (None, point.kv_type):
            table.add_row()
        before = point.kv_type
        table.add_row(
            point.kv_type,
            point.phase,
            str(point.depth),
            str(point.n_seq),
            f"{point.tokens_per_s:.0f}" if point.tokens_per_s >= 100 else f"{point.tokens_per_s:.1f}",
            f"{50 * point.spread:.0f} %" if point.n_trials > 1 else "",
            "" if point.limit_share is None else f"{100 * point.limit_share:.0f} %",
        )
    return table
