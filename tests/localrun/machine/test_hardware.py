"""Cores from a sysfs of our own, the choice of threads and what is kept of it, and the measured bandwidth."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from deepdistill.localrun.machine import hardware
from deepdistill.localrun.machine.hardware import best_threads, cache_dir, cpu_name, default_threads, memory_bandwidth

BuildCPUs = Callable[..., None]


@pytest.fixture
def cpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BuildCPUs:
    """Make this machine have the given cores: (highest clock in kHz or None, threads) each."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(psutil, "getloadavg", lambda: (0.4, 0.4, 0.4))

    def build(*cores: tuple[int | None, int], quota: int | None = None) -> None:
        cpu = 0
        for core, (clock, n_threads) in enumerate(cores):
            for _ in range(n_threads):
                files = {"topology/physical_package_id": "0\n", "topology/core_id": f"{core}\n"}
                if clock is not None:
                    files["cpufreq/cpuinfo_max_freq"] = f"{clock}\n"
                for name, text in files.items():
                    file = tmp_path / "sys/devices/system/cpu" / f"cpu{cpu}" / name
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_text(text)
                cpu += 1
        if quota is not None:
            (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
            (tmp_path / "sys/fs/cgroup/cpu.max").write_text(f"{quota * 100_000} 100000\n")
        monkeypatch.setattr(hardware, "ROOT", tmp_path)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cpu)), raising=False)

    return build


@pytest.mark.parametrize(
    ("cores", "n_physical", "n_performance"),
    [
        ([(3_000_000, 1)] * 2, 2, 2),
        ([(None, 1)] * 4, 4, 4),  # a virtual machine: no clocks
        ([(4_700_000, 2)] * 6, 6, 6),
        ([(5_200_000, 2)] * 4 + [(3_900_000, 1)] * 8, 12, 4),  # performance and efficiency cores
        ([(5_800_000, 2)] * 2 + [(5_500_000, 2)] * 6 + [(4_300_000, 1)] * 16, 24, 8),  # two of them favoured
    ],
)
def test_cores(cpus: BuildCPUs, cores: list[tuple[int | None, int]], n_physical: int, n_performance: int) -> None:
    cpus(*cores)
    assert (hardware.physical_cores(), hardware.performance_cores()) == (n_physical, n_performance)
    assert default_threads() == n_physical


def test_a_containers_quota_bounds_the_cores(cpus: BuildCPUs) -> None:
    cpus(*[(None, 2)] * 8, quota=3)
    assert (hardware.physical_cores(), hardware.performance_cores()) == (3, 3)


class Clock:
    """A measurement that takes the seconds it is told to, and notes what it was asked."""

    def __init__(self, seconds: dict[int, float]) -> None:
        self.seconds = seconds
        self.asked: list[int] = []

    def __call__(self, n_threads: int) -> float:
        self.asked.append(n_threads)
        return self.seconds[n_threads]


@pytest.mark.parametrize(
    ("seconds", "best"),
    [
        ({8: 1.0, 4: 1.9, 1: 7.0}, 8),
        ({1: 1.0, 4: 90.0}, 1),  # oversubscribed: the more threads, the slower
        ({8: 1.0, 4: 1.03, 1: 3.0}, 4),  # bound by memory: half of the threads do as well
        ({8: 1.2, 4: 1.0, 1: 2.0}, 4),
    ],
)
def test_the_fewest_threads_that_are_fastest(
    cpus: BuildCPUs, tmp_path: Path, seconds: dict[int, float], best: int
) -> None:
    cpus(*[(None, 1)] * 8)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert best_threads(tmp_path / "model.gguf", Clock(seconds)) == best


def test_candidates(cpus: BuildCPUs, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    cpus(*[(5_000_000, 2)] * 4, *[(3_800_000, 1)] * 8)
    clock = Clock({12: 1.0, 6: 1.0, 4: 1.0, 1: 1.0})
    assert best_threads(tmp_path / "model.gguf", clock) == 1
    assert clock.asked == [1, 1, 4, 4, 6, 6, 12, 12]
    clock = Clock({1: 1.0, 4: 1.6})  # more threads would take longer still: they are not waited for
    assert best_threads(tmp_path / "model.gguf", clock, remeasure=True) == 1
    assert clock.asked == [1, 1, 4, 4]


def test_a_measurement_on_busy_cores_is_kept_for_a_short_time(
    cpus: BuildCPUs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpus(*[(None, 1)] * 2)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(psutil, "getloadavg", lambda: (1.9, 0.0, 0.0))
    now = 1000.0
    monkeypatch.setattr(hardware.time, "time", lambda: now)
    assert best_threads(tmp_path / "model.gguf", Clock({2: 5.0, 1: 1.0})) == 1
    now += 599
    assert best_threads(tmp_path / "model.gguf", Clock({2: 1.0, 1: 2.0})) == 1
    now += 2
    monkeypatch.setattr(psutil, "getloadavg", lambda: (0.1, 5.0, 5.0))
    assert best_threads(tmp_path / "model.gguf", Clock({2: 1.0, 1: 2.0})) == 2
    now += 1e9
    assert best_threads(tmp_path / "model.gguf", Clock({2: 5.0, 1: 1.0})) == 2, "now it is kept for good"


def test_one_measurement_a_machine_and_model(cpus: BuildCPUs, tmp_path: Path) -> None:
    cpus(*[(None, 1)] * 2)
    model, other, same_size = tmp_path / "a.gguf", tmp_path / "b.gguf", tmp_path / "c.gguf"
    model.write_bytes(b"GGUF one")
    other.write_bytes(b"GGUF one, longer")
    same_size.write_bytes(b"GGUF two")
    busy, calm = Clock({2: 5.0, 1: 1.0}), Clock({2: 1.0, 1: 2.0})
    assert [best_threads(model, busy), best_threads(model, calm)] == [1, 1]
    assert calm.asked == []
    assert [best_threads(other, calm), best_threads(same_size, calm)] == [2, 2]
    assert best_threads(model.rename(tmp_path / "renamed.gguf"), calm) == 1
    assert best_threads(tmp_path / "renamed.gguf", calm, remeasure=True) == 2
    assert best_threads(tmp_path / "renamed.gguf", busy) == 2
    cpus(*[(None, 1)] * 4)
    assert best_threads(tmp_path / "renamed.gguf", Clock({4: 1.0, 2: 1.0, 1: 2.0})) == 2  # another machine
    assert [path.name for path in cache_dir().iterdir()] == ["threads.json"]


@pytest.mark.parametrize("limit", ["1", "2", "64"])
def test_omp_num_threads_decides(limit: str, cpus: BuildCPUs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpus(*[(None, 1)] * 8)
    monkeypatch.setenv("OMP_NUM_THREADS", limit)
    clock = Clock({})
    assert best_threads(tmp_path / "nothing.gguf", clock) == min(8, int(limit)) == default_threads()
    assert clock.asked == []
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    assert default_threads() == 8


def test_one_core_needs_no_measuring(cpus: BuildCPUs, tmp_path: Path) -> None:
    cpus((None, 2))
    assert best_threads(tmp_path / "nothing.gguf", Clock({})) == 1


@pytest.mark.parametrize(
    "junk", ["", "{", "[]", "null", '{"KEY": 3}', '{"KEY": {"FILE": "two"}}', '{"KEY": {"FILE": 99}}']
)
def test_a_broken_cache_is_measured_over(junk: str, cpus: BuildCPUs, tmp_path: Path) -> None:
    cpus(*[(None, 1)] * 2)
    model = tmp_path / "model.gguf"
    model.write_bytes(b"GGUF")
    best_threads(model, Clock({2: 1.0, 1: 2.0}))
    store = cache_dir() / "threads.json"
    ((machine, files),) = json.loads(store.read_text()).items()
    store.write_text(junk.replace("KEY", machine).replace("FILE", next(iter(files))))
    assert best_threads(model, Clock({2: 2.0, 1: 1.0})) == 1
    assert best_threads(model, Clock({})) == 1
    assert json.loads(store.read_text())[machine] == {next(iter(files)): 1}


def test_a_cache_that_cannot_be_written_does_no_harm(
    cpus: BuildCPUs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpus(*[(None, 1)] * 2)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert best_threads(tmp_path / "model.gguf", Clock({2: 1.0, 1: 2.0})) == 2


@pytest.mark.parametrize(
    ("users", "spins"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)],
)
def test_spinning_is_bounded_unless_the_user_says_how(
    users: dict[str, str], spins: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", dict(users))
    hardware.bound_spinning()
    assert os.environ.get("GOMP_SPINCOUNT") == spins


def test_the_processor_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Some CPU @ 3 GHz\nflags\t: fpu\n")
    monkeypatch.setattr(hardware, "ROOT", tmp_path)
    assert cpu_name() == "Some CPU @ 3 GHz"
    monkeypatch.setattr(hardware, "ROOT", tmp_path / "none")
    assert cpu_name()


def test_bandwidth_is_bytes_over_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 3.0, 10.0, 12.0, 20.0, 25.0])
    monkeypatch.setattr(hardware.time, "perf_counter", lambda: next(now))
    assert memory_bandwidth(4001, n_threads=3, n_passes=3) == 2000  # whole floats, the best of three passes
