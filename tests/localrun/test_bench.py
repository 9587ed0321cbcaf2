"""The arithmetic of the measurements under a clock of our own; what is left out, refused and printed."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, repeat
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from deepdistill.errors import ModelError
from deepdistill.localrun import bench as bench_module
from deepdistill.localrun.bench import QUICK, BenchReport, BenchSettings, Point, bench, print_bench
from deepdistill.localrun.engine.llama import Context, Entry, Model
from deepdistill.localrun.machine import hardware, memory
from deepdistill.localrun.machine.memory import Footprint

measure = partial(bench, patience_s=1e9)  # the clock below runs fast
SMALL = BenchSettings(depths=(0, 64), batch_sizes=(1, 4), kv_types=("f16",), n_prompt=96, n_tokens=8, n_trials=3)


class World:
    """A clock that stands still but for llama.cpp's batches, which take `seconds(n_entries)` each."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.seconds: Callable[[int], float] = lambda n: 1 + n / 1000
        self.batches: list[list[Entry]] = []
        run = Context.decode

        def decode(context: Context, entries: Sequence[Entry]) -> bool:
            self.batches.append(list(entries))
            self.now += self.seconds(len(entries))
            return run(context, entries)

        monkeypatch.setattr(Context, "decode", decode)
        monkeypatch.setattr(bench_module.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(hardware, "memory_bandwidth", lambda: 1e9)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


def test_rates_are_tokens_over_seconds(random_gguf: Path, world: World) -> None:
    report = measure(random_gguf, SMALL, n_threads=1)
    measured = [(p.phase, p.n_seq, p.depth, p.n_tokens, p.n_trials) for p in report.points]
    assert measured == [
        ("prefill", 1, 0, 96, 3),
        ("decode", 1, 0, 8, 3),
        ("prefill", 1, 64, 96, 3),
        ("decode", 1, 64, 8, 3),
        ("decode", 4, 0, 8, 3),
    ]
    rates = [point.tokens_per_s for point in report.points]
    assert rates == pytest.approx([96 / 1.096, 1 / 1.001, 96 / 1.096, 1 / 1.001, 4 / 1.004])
    assert [point.spread for point in report.points] == pytest.approx([0] * 5, abs=1e-9)
    assert report.first_token_s == pytest.approx(1.096)
    assert report.n_threads == 1


def test_a_share_of_the_limit_counts_the_weights_once_and_every_cache(random_gguf: Path, world: World) -> None:
    footprint = Footprint.of(random_gguf)
    kv = 2 * 2 * 2 * 16 * 2  # key and value, layers, heads, width, bytes of f16
    shares = {
        (p.n_seq, p.depth): p.limit_share for p in measure(random_gguf, SMALL, n_threads=1).points if p.limit_share
    }
    for n_seq, depth in ((1, 0), (1, 64), (4, 0)):
        seconds = (footprint.read_bytes + n_seq * (depth + 4) * kv) / 1e9
        assert shares[n_seq, depth] == pytest.approx(seconds / (1 + n_seq / 1000))
    assert len(shares) == 3


def test_every_trial_begins_at_its_depth_with_nothing_else_in_the_cache(random_gguf: Path, world: World) -> None:
    measure(random_gguf, SMALL, n_threads=1)
    held: dict[int, int] = {}
    for batch in world.batches:
        for entry in batch:
            assert entry.position <= held.get(entry.sequence, 0), "a gap in the cache"
            held[entry.sequence] = entry.position + 1
    decodes = [batch for batch in world.batches if all(entry.wanted for entry in batch)]
    starts = [batch[0].position for batch in decodes if len(batch) == 1]
    assert starts == [*range(8)] * 4 + [*range(64, 72)] * 4  # a warm-up and three trials at each depth
    assert [len(batch) for batch in decodes if len(batch) > 1] == [4] * 32
    assert all(0 <= entry.token < Footprint.of(random_gguf).n_vocab for batch in world.batches for entry in batch)


def test_the_warm_up_does_not_count_and_the_median_does(random_gguf: Path, world: World) -> None:
    taken = chain([100.0, 1.0, 4.0, 2.0], repeat(1.0))
    world.seconds = lambda n: next(taken)
    settings = replace(SMALL, depths=(0,), batch_sizes=(1,), n_prompt=64)
    prefill, decode = measure(random_gguf, settings, n_threads=1).points
    assert (prefill.tokens_per_s, prefill.spread) == (32, 1.5)
    assert (decode.tokens_per_s, decode.spread) == (1, 0)


def test_a_slow_model_gets_fewer_trials(random_gguf: Path, world: World) -> None:
    assert [p.n_trials for p in bench(random_gguf, SMALL, n_threads=1, patience_s=10).points] == [3, 1, 3, 1, 1]


def test_what_the_model_cannot_do_is_left_out_with_a_note(random_gguf: Path, world: World) -> None:
    settings = replace(SMALL, depths=(0, 416, 417), kv_types=("f16", "q8_0"))
    report = measure(random_gguf, settings, n_threads=1)
    assert sorted({point.depth for point in report.points}) == [0, 416]
    assert {point.kv_type for point in report.points} == {"f16"}
    assert report.notes == (
        "depth 417 is left out: its context holds 512 tokens",
        "q8_0 is left out: its heads' width is not a multiple of the block",
    )


def test_memory_is_that_of_the_cache_and_the_process(random_gguf: Path, world: World) -> None:
    report = measure(random_gguf, SMALL, n_threads=1)
    (use,) = report.memory
    assert use.n_ctx == 256  # 160 tokens, rounded up
    assert use.kv_bytes == 256 * 256
    assert use.resident_bytes == report.peak_bytes > 1e7
    assert use.estimated_bytes > Footprint.of(random_gguf).weight_bytes + use.kv_bytes


def test_too_little_memory_is_said_before_loading(random_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(path: Path) -> Model:
        raise AssertionError("it was loaded")

    monkeypatch.setattr(bench_module, "Model", load)
    monkeypatch.setattr(memory, "available_bytes", lambda: 1_000_000)
    with pytest.raises(ModelError, check=lambda error: error.code == "not-enough-memory"):
        measure(random_gguf, SMALL)


def test_the_thread_count_is_measured_and_kept(
    random_gguf: Path, world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(hardware, "physical_cores", lambda: 2)
    monkeypatch.setattr(hardware, "performance_cores", lambda: 2)
    monkeypatch.setattr(psutil, "getloadavg", lambda: (0.4, 0.4, 0.4))  # what busy cores show is not kept
    asked: list[int] = []

    def seconds(model: Model, n_threads: int) -> float:
        asked.append(n_threads)
        return 1.0 / n_threads

    monkeypatch.setattr(bench_module, "seconds_per_token", seconds)
    assert measure(random_gguf, SMALL).n_threads == 2
    assert asked == [1, 1, 2, 2]
    assert hardware.best_threads(random_gguf, lambda n: 1.0 * n) == 2
    assert measure(random_gguf, SMALL, n_threads=1).n_threads == 1


def test_seconds_per_token(random_gguf: Path, world: World) -> None:
    model = Model(random_gguf)
    try:
        world.seconds = lambda n: 0.1
        assert bench_module.seconds_per_token(model, 1) == pytest.approx(0.1)
        assert len(world.batches) == 9  # one is a warm-up
        world.seconds = lambda n: 5.0  # threads that wait for one another are not waited for
        assert bench_module.seconds_per_token(model, 1) == pytest.approx(5.0)
        assert len(world.batches) == 11
    finally:
        model.close()


def test_quick_is_less_of_the_same() -> None:
    full = BenchSettings()
    assert QUICK.n_points * 3 < full.n_points
    assert set(QUICK.depths) <= set(full.depths)
    assert set(QUICK.batch_sizes) <= set(full.batch_sizes)


@pytest.fixture
def report(random_gguf: Path) -> BenchReport:
    points = tuple(
        Point(phase, kv_type, n_seq, depth, 32, 5, rate, 0.123, 0.456 if phase == "decode" else None)
        for kv_type in ("f16", "q8_0")
        for phase, n_seq, depth, rate in (("prefill", 1, 2048, 12345.6), ("decode", 16, 2048, 7.89))
    )
    use = bench_module.MemoryUse("q8_0", 2560, 10**8, 3 * 10**8, 4 * 10**8)
    name = Path("a-very-long-name-of-a-model-that-someone-uploaded-Q4_K_M.gguf")
    cpu = "Some Processor With A Long Name @ 3.00 GHz"
    return BenchReport(name, 10**8, cpu, 12, 5e10, 0.5, 1.234, 512, points, (use,), ("something is left out",))


@pytest.mark.parametrize("width", [60, 120])
def test_it_prints_readably_at_any_width(report: BenchReport, width: int) -> None:
    console = Console(width=width, no_color=True)
    with console.capture() as capture:
        print_bench(report, console)
    lines = capture.get().splitlines()
    assert max(map(len, lines)) <= width
    rows = [line.split() for line in lines]
    assert ["KV", "phase", "depth", "batch", "tokens/s", "±", "limit"] in rows
    assert ["f16", "prefill", "2048", "1", "12346", "6", "%"] in rows
    assert ["q8_0", "decode", "2048", "16", "7.9", "6", "%", "46", "%"] in rows
    assert "note: something is left out" in lines
    assert "1.23 s after a prompt of 512 tokens" in capture.get()


def test_json(report: BenchReport) -> None:
    record = json.loads(json.dumps(report.to_json()))
    assert record["peak_bytes"] == 3 * 10**8
    assert [point["tokens_per_s"] for point in record["points"]] == [12345.6, 7.89] * 2
    assert record["path"].endswith("Q4_K_M.gguf")
