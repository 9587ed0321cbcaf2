"""Mutated replies and rows, in small: benchmarks/fuzz_inputs.py tries 100,000."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_mutated_inputs_end_in_nothing_but_their_own_errors() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "fuzz_inputs.py"), "--n", "1500", "--seed", "11"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert [found["replies"]["read"] > 50, found["problems"]["taken"] > 50, found["traces"]["taken"] > 50] == [True] * 3
    assert found["slowest_s"] < 10
