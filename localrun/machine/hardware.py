"""What this machine computes with: its cores, the best number of threads for a model, its memory's bandwidth."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import ArtifactError
from ..core.atomic import write_text

ROOT = Path("/")
"""Where Linux's `proc` and `sys` are read; the tests read them elsewhere."""

_PERFORMANCE = 0.85  # share of the highest clock: efficiency cores are below it, the spread among equal cores above
_CLEARLY = 1.5  # times slower: more threads would only be slower still
_WITHIN = 1.05  # times the fastest: the fewest threads within it leave the other cores to other programs
_BUSY_S = 600.0  # for how long a thread count measured on busy cores is kept
_HEADER = 1 << 20  # bytes that distinguish files of the same size
_GPU_TYPES = (1, 2)  # ggml_backend_dev_type: a card of its own, one that shares the system's memory


def default_threads() -> int:
    """Return how many threads to compute with before anything was measured: one for each physical core that we may use.

    Hyper-threads share the units that llama.cpp keeps busy, and its threads wait for one another actively: one too many
    costs more than one too few. `OMP_NUM_THREADS` lowers the number, as it does for other numeric libraries.
    """
    return min(physical_cores(), _thread_limit() or physical_cores())


def best_threads(path: Path, measure: Callable[[int], float], *, remeasure: bool = False) -> int:
    """Return the thread count that runs a file fastest here, measured once and kept in the user's cache.

    `measure(n)` returns the seconds that a fixed amount of work takes with n threads. It is called twice each for one
    thread, half the physical cores, the performance cores and all physical cores, the fewest first. On a busy or
    oversubscribed machine two threads can be a hundred times slower than one, which no count of cores tells.
    `OMP_NUM_THREADS` decides without measuring; `remeasure` ignores a kept result. A result from busy cores, as when a
    script runs several calls, is kept for ten minutes only.
    """
    cores = physical_cores()
    if _thread_limit() or cores == 1:
        return default_threads()
    machine, file = f"{cpu_name()}, {cores} cores", _file_key(path)
    known = _read_threads().get(machine, {})
    kept = _still_good(known.get(file) if isinstance(known, dict) else None)
    if not remeasure and kept is not None and 1 <= kept <= cores:
        return kept
    best = _measure_threads(sorted({1, max(1, cores // 2), performance_cores(), cores}), measure)
    _keep_threads(machine, file, {"threads": best, "until": time.time() + _BUSY_S} if _is_busy(cores) else best)
    return best


def _still_good(kept: Any) -> int | None:
    """Return the thread count of an entry of the cache; None if it has expired or is broken."""
    if isinstance(kept, dict):
        until = kept.get("until")
        kept = kept.get("threads") if isinstance(until, int | float) and time.time() < until else None
    return kept if isinstance(kept, int) else None


def _is_busy(cores: int) -> bool:
    """Return whether half of the cores or more were busy in the last minute."""
    import psutil  # type: ignore[import-untyped]

    return bool(psutil.getloadavg()[0] >= cores / 2)


def _measure_threads(candidates: list[int], measure: Callable[[int], float]) -> int:
    """Return the fewest threads that are as good as the fastest."""
    seconds: dict[int, float] = {}
    for n in candidates:
        seconds[n] = min(measure(n), measure(n))  # the faster of two: other programs only ever slow it down
        if seconds[n] > _CLEARLY * min(seconds.values()):
            break
    return min(n for n, taken in seconds.items() if taken <= _WITHIN * min(seconds.values()))


def bound_spinning() -> None:
    """Make llama.cpp's threads sleep soon when they wait for one another; call this before its library is loaded.

    They meet hundreds of times a token, and GNU OpenMP lets those that arrive first spin for milliseconds. If another
    program holds the last one's core, the spinning delays it even more: two threads on two busy cores decoded 0.3
    tokens/s where one decoded 100. OpenMP itself spins 1,000 times when it knows that there are too few cores; on idle
    cores that costs nothing, while no spinning at all halves the speed. A user's own setting is kept.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def cache_dir() -> Path:
    """Return the folder for what can be measured or downloaded again."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "deepdistill"


def _file_key(path: Path) -> str:
    with path.open("rb") as file:
        return f"{path.stat().st_size}-{hashlib.sha256(file.read(_HEADER)).hexdigest()[:16]}"


def _read_threads() -> dict[str, Any]:
    try:
        found = json.loads((cache_dir() / "threads.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _keep_threads(machine: str, file: str, n: int | dict[str, float]) -> None:
    """Add one measurement to the cache; if it cannot be written, the next call only has to measure again."""
    found = _read_threads()
    known = found.get(machine)
    found[machine] = (known if isinstance(known, dict) else {}) | {file: n}
    with suppress(OSError, ArtifactError):
        cache_dir().mkdir(parents=True, exist_ok=True)
        write_text(cache_dir() / "threads.json", json.dumps(found, indent=1))


def _thread_limit() -> int | None:
    limit = os.environ.get("OMP_NUM_THREADS", "")
    return int(limit) if limit.isdigit() and int(limit) > 0 else None


def cpu_name() -> str:
    """Return the processor's name as its maker writes it, or the architecture where the system gives no name."""
    named = _cpuinfo("model name", "Hardware", "cpu model")
    return named or platform.processor() or platform.machine() or "unknown processor"


def cpu_flags() -> set[str]:
    """Return Linux's names of the processor's features, empty elsewhere."""
    return set(_cpuinfo("flags").split())


def _cpuinfo(*names: str) -> str:
    """Return the first value with one of these names."""
    with suppress(OSError):
        for line in (ROOT / "proc" / "cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() in names and value.strip():
                return value.strip()
    return ""


def physical_cores() -> int:
    """Return the physical cores that this process may use, at least 1."""
    cores = len(_usable_cores())
    return max(1, min(cores, _quota() or cores))


def performance_cores() -> int:
    """Return how many physical cores are fast ones: all of them where the processor has one kind."""
    clocks = [max(map(_max_clock, cpus)) for cpus in _usable_cores()]
    fast = sum(clock >= _PERFORMANCE * max(clocks) for clock in clocks)
    return max(1, min(fast, physical_cores()))


def _usable_cores() -> list[list[int]]:
    """Return the physical cores that this process may use, each as the list of its logical CPUs."""
    if not hasattr(os, "sched_getaffinity"):  # macOS, Windows
        import psutil

        return [[cpu] for cpu in range(psutil.cpu_count(logical=False) or os.cpu_count() or 1)]
    cores: dict[tuple[str, str], list[int]] = {}
    for cpu in os.sched_getaffinity(0):
        cores.setdefault(_core_of(cpu), []).append(cpu)
    return list(cores.values())


def _core_of(cpu: int) -> tuple[str, str]:
    """Return the (package, core) of a logical CPU; a core of its own where the system does not tell."""
    try:
        topology = _cpu_dir(cpu) / "topology"
        return (topology / "physical_package_id").read_text(), (topology / "core_id").read_text()
    except OSError:
        return "", str(cpu)


def _cpu_dir(cpu: int) -> Path:
    return ROOT / "sys" / "devices" / "system" / "cpu" / f"cpu{cpu}"


def _max_clock(cpu: int) -> int:
    """Return a logical CPU's highest clock in kHz; 0 where the system does not tell."""
    try:
        return int((_cpu_dir(cpu) / "cpufreq" / "cpuinfo_max_freq").read_text())
    except (OSError, ValueError):
        return 0


def _quota() -> int | None:
    """Return how many whole CPUs a container may use, None without a limit."""
    try:
        quota, period = (ROOT / "sys" / "fs" / "cgroup" / "cpu.max").read_text().split()
        return None if quota == "max" else max(1, int(quota) // int(period))
    except (OSError, ValueError):
        return None


@dataclass(frozen=True)
class Gpu:
    """A graphics processor that the installed llama.cpp computes on."""

    name: str
    free_bytes: int
    total_bytes: int
    shares_memory: bool  # it has no memory of its own


def gpus() -> list[Gpu]:
    """Return the graphics processors that the installed llama.cpp supports and finds.

    Raises:
        ImportError, OSError, RuntimeError: llama-cpp-python does not work here.
    """
    bound_spinning()
    import llama_cpp

    if not llama_cpp.llama_supports_gpu_offload():
        return []
    library = llama_cpp.llama_cpp._lib  # libllama: the loader finds ggml's functions through it
    library.ggml_backend_dev_count.restype = ctypes.c_size_t
    library.ggml_backend_dev_get.restype = ctypes.c_void_p
    library.ggml_backend_dev_description.restype = ctypes.c_char_p
    found = []
    for i in range(library.ggml_backend_dev_count()):
        device = ctypes.c_void_p(library.ggml_backend_dev_get(ctypes.c_size_t(i)))
        if (kind := library.ggml_backend_dev_type(device)) not in _GPU_TYPES:
            continue
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        library.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
        name = (library.ggml_backend_dev_description(device) or b"GPU").decode("utf-8", "replace")
        found.append(Gpu(name, free.value, total.value, kind != _GPU_TYPES[0] or sys.platform == "darwin"))
    return found


def memory_bandwidth(n_bytes: int = 1 << 28, n_threads: int | None = None, n_passes: int = 8) -> float:
    """Return the bytes/s that all threads together read from memory, the best of several passes.

    Generating a token reads all of a model's weights once, so that this bounds the tokens/s of any file. The maximum of
    a float array is a plain read: numpy computes it with vector instructions and without the interpreter's lock.
    """
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np

    n_threads = n_threads or default_threads()
    parts = np.array_split(np.ones(n_bytes // 4, np.float32), n_threads)  # written to, so that its pages are there
    best = float("inf")
    with ThreadPoolExecutor(n_threads) as pool:
        for _ in range(n_passes):
            started = time.perf_counter()
            list(pool.map(np.max, parts))
            best = min(best, time.perf_counter() - started)
    return sum(part.nbytes for part in parts) / best
