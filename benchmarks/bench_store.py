"""A store of a million traces of about 2 KB: seconds and peak memory of opening, reading and adding to it.

    python benchmarks/bench_store.py [--n 1000000] [--folder /tmp]

Each step runs in a process of its own, so that its peak memory is its own. "cold" is after the kernel was asked to drop
the file from its cache. There is no index that could be stale: opening reads every line, and parses only those that do
not begin and end like ours. The file takes 2 GB under --folder and is deleted at the end.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from deepdistill.distill.records import Grade, Problem, Trace
from deepdistill.distill.teachers import TeacherInfo
from deepdistill.distill.traces.store import TraceStore
from deepdistill.localrun.core.generation import Completion, Sampling
from deepdistill.localrun.core.record_log import to_json

INFO = TeacherInfo("teacher", "endpoint")
THOUGHT = "Let me see. 47 + 85: 7 + 5 = 12, write 2, carry 1; 4 + 8 + 1 = 13. So 132. Check: 132 - 85 = 47. " * 14


def make(index: int) -> Trace:
    """Return a trace of about 2 KB whose id is that of its index."""
    problem = Problem(f"{index:016x}", f"What is 47 + 85 + {index}?", str(132 + index), "made", "math")
    completion = Completion(f"It is {132 + index}.", THOUGHT, True, "stop", 20, 700, 650, 12.5)
    return Trace.make(
        problem,
        completion,
        grade=Grade(str(132 + index), "right", "grader", 1.0),
        info=INFO,
        teacher="t",
        sampling=Sampling(),
    )


def write(path: Path, n: int) -> None:
    """Write n distinct traces without going through the store."""
    template = make(0)
    head, middle, tail = to_json(template).partition(template.problem_id)
    with path.open("w", encoding="utf-8", buffering=1 << 20) as lines:
        for index in range(n):
            digest = hashlib.sha256(str(index).encode()).hexdigest()[:32]
            lines.write(head.replace(template.id, digest) + f"{index:016x}" + tail + "\n")
        lines.flush()
        os.fsync(lines.fileno())
    assert middle


def open_store(path: Path) -> int:
    """Open and close the store."""
    with TraceStore(path) as store:
        return len(store)


def read(path: Path) -> int:
    """Read every trace."""
    return sum(1 for _ in TraceStore.read(path))


def append(path: Path) -> int:
    """Add 10,000 traces; their seconds alone are printed."""
    traces = [
        replace(make(index), id=hashlib.sha256(f"new {index}".encode()).hexdigest()[:32]) for index in range(10_000)
    ]
    with TraceStore(path) as store:
        started = time.monotonic()
        for trace in traces:
            store.append(trace)
        print(json.dumps({"append_s": time.monotonic() - started}))
        return len(store)


STEPS = {"open": open_store, "read": read, "append": append}


def measure(step: str, path: Path) -> dict[str, float]:
    """Run a step in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--step", step, "--folder", str(path)], capture_output=True, text=True, check=True
    )
    found: dict[str, float] = {}
    for line in done.stdout.splitlines():
        found |= json.loads(line)
    return found


def drop_from_cache(path: Path) -> bool:
    """Ask the kernel to forget the file; say whether there is a way to ask."""
    if not hasattr(os, "posix_fadvise"):
        return False
    handle = os.open(path, os.O_RDONLY)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)
    return True


def main() -> None:
    """Measure and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--step", choices=STEPS)
    options = parser.parse_args()
    if options.step:
        started = time.monotonic()
        n = STEPS[options.step](options.folder)
        seconds = time.monotonic() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        print(json.dumps({"n": n, "s": seconds, "peak_mb": peak / 1e6}))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "traces.jsonl"
        started = time.monotonic()
        write(path, options.n)
        result: dict[str, object] = {"n": options.n, "gb": path.stat().st_size / 1e9, "cores": os.cpu_count()}
        print(f"wrote {result['gb']:.2f} GB in {time.monotonic() - started:.1f} s", file=sys.stderr)
        steps = [("open_cold", "open"), ("open_warm", "open"), ("read_warm", "read"), ("append_10000", "append")]
        for name, step in steps:
            if name.endswith("cold") and not drop_from_cache(path):
                continue
            result[name] = measure(step, path)
            print(name, result[name], file=sys.stderr)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
