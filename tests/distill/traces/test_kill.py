"""The store under `kill -9`, with faults injected: the benchmark that does it 200 times, in small."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[3] / "benchmarks" / "bench_kill.py"


@pytest.mark.slow
def test_killed_writers_lose_double_and_tear_nothing() -> None:
    done = subprocess.run([sys.executable, BENCH, "--kills", "20", "--seed", "7"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["ok"]
    assert found["promised"] > 20
    assert found["traces"] >= found["promised"]
    assert found["refused_writes"] > 0, "the file-size limit was met"
