"""`teach` under a launcher of several processes: one does everything, the others train with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from deepdistill.distill.curves import read_curve

SUMS = "gym:chain_sum?min_terms=2&max_terms=2&min_digits=1&max_digits=2"
TEACH = ["--problems", SUMS, "--n-traces", "60", "--n-eval", "4", "--eval-max-tokens", "8"]
TRAIN = ["--full", "--steps", "3", "--train-batch-size", "4", "--train-dtype", "fp32", "--n-validation", "0"]
LAUNCHER = ["-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]


def teach(launcher: list[str], student: Path, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *launcher, "deepdistill", "teach", *TEACH, *TRAIN, "--student", str(student)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, "--out", str(out), *more], capture_output=True, text=True, timeout=300, check=False, env=environment
    )


@pytest.mark.slow
def test_teach_in_two_processes_comes_to_what_one_comes_to(pocket_student: Path, tmp_path: Path) -> None:
    one = teach(["-m"], pocket_student, tmp_path / "one", "--json", "--quiet")
    two = teach(LAUNCHER, pocket_student, tmp_path / "two", "--json", "--quiet")
    assert (one.returncode, two.returncode) == (0, 0), two.stderr[-3000:]
    results = [json.loads(done.stdout.strip().splitlines()[-1]) for done in (one, two)]
    assert results[0]["training"]["steps"] == results[1]["training"]["steps"] == 3
    assert two.stdout.count("traces train") == 1  # the other process is silent
    losses = [
        [point["loss"] for point in read_curve(tmp_path / name / "curve.jsonl") if "loss" in point]
        for name in ("one", "two")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=2e-4)
    assert set(results[1]["scores"]) == {"base", "student"}


@pytest.mark.slow
def test_an_error_of_the_first_process_ends_the_others(pocket_student: Path, tmp_path: Path) -> None:
    done = teach(LAUNCHER, pocket_student, tmp_path / "run", "--traces", str(tmp_path / "none.jsonl"))
    assert done.returncode == 1
    assert done.stderr.count("error: ") == 1
