"""How much a student learns in the same minutes: imitation alone, with a curriculum, with on-policy rounds.

    python benchmarks/bench_learning.py --minutes 8
    python benchmarks/bench_learning.py --arms imitation --seeds 1 --minutes 12

SmolLM2-135M on chain sums of 2 to 4 terms of 1 to 2 digits, taught by the pocket teacher; 200 held-out problems. An arm
and a seed are a cell, a run folder of its own: `deepdistill teach` with the training boxed to the same minutes (rounds
share them; sampling is not training). Every seed's traces are asked for once. A finished cell is kept in --out and the
same command goes on where it stopped, in the middle of a training too. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PROBLEMS = "gym:chain_sum?min_terms=2&max_terms=4&min_digits=1&max_digits=2"
ARMS: dict[str, list[str]] = {
    "imitation": [],
    "curriculum": ["--curriculum"],
    "rounds": ["--rounds", "2"],
    "curriculum and rounds": ["--curriculum", "--rounds", "2"],
}


def main() -> None:
    """Run the cells that are missing and print the table and the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", default="imitation,curriculum,rounds", help="with commas between them")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=15.0, help="of training, in all")
    parser.add_argument("--n-traces", type=int, default=6000)
    parser.add_argument("--n-eval", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=4, help="rows a step")
    parser.add_argument("--lr", type=float, default=1.2e-3, help="chosen on other problems: see docs/experiments.md")
    parser.add_argument("--student", default="smollm2")
    parser.add_argument("--out", type=Path, default=Path("runs/bench_learning"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "cells.json"
    cells: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    arms = [arm.strip() for arm in options.arms.split(",")]
    for seed in range(options.seeds):
        for arm in arms:
            key = key_of(options, arm, seed)
            if key not in cells:
                cells[key] = run_cell(options, arm, seed)
                path.write_text(json.dumps(cells, indent=1))
            print(f"{key}: {cells[key]}", file=sys.stderr, flush=True)
    print(json.dumps(table(options, cells, arms)))


def key_of(options: argparse.Namespace, arm: str, seed: int) -> str:
    """Return what names a cell."""
    return f"{arm}, seed {seed}, {options.minutes:g} minutes, {options.batch_size} rows, {options.lr:g}"


def run_cell(options: argparse.Namespace, arm: str, seed: int) -> dict[str, Any]:
    """Teach one student and return what it came to."""
    traces = options.out / f"traces-{seed}"
    teach(options, traces, seed, ["--stop-after", "traces"])
    folder = options.out / f"{arm.replace(' ', '-')}-{options.batch_size}x{options.minutes:g}-{options.lr:g}-{seed}"
    started = time.monotonic()
    boxed = ["--minutes", str(options.minutes), "--epochs", "100", "--train-batch-size", str(options.batch_size)]
    boxed += ["--lr", str(options.lr)]
    teach(options, folder, seed, ["--traces", str(traces / "traces.jsonl"), *boxed, *ARMS[arm]])
    scores = json.loads((folder / "scores.json").read_text())
    training = json.loads((folder / "training.json").read_text())
    kept = (
        "steps",
        "rows",
        "minutes",
        "tokens_per_s",
        "final_loss",
        "validation_accuracy",
        "stopped",
        "threads",
        "dtype",
    )
    return {
        "accuracy": scores["student"]["accuracy"],
        "interval": scores["student"]["interval"],
        "base": scores["base"]["accuracy"],
        "closed": scores["student"]["closed"],
        "looped": scores["student"]["looped"],
        "minutes_in_all": round((time.monotonic() - started) / 60, 1),
        "training": {name: training[name] for name in kept if name in training},
    }


def teach(options: argparse.Namespace, folder: Path, seed: int, more: list[str]) -> None:
    """Run `deepdistill teach`, which goes on where it was."""
    command = [sys.executable, "-m", "deepdistill", "teach", "--problems", PROBLEMS, "--student", options.student]
    command += ["--n-traces", str(options.n_traces), "--n-eval", str(options.n_eval), "--seed", str(seed), "--quiet"]
    subprocess.run([*command, "--out", str(folder), *more], check=True, stdout=subprocess.DEVNULL)


def table(options: argparse.Namespace, cells: dict[str, Any], arms: list[str]) -> dict[str, Any]:
    """Print a line an arm, and return the figures."""
    found = {}
    for arm in arms:
        keys = [key_of(options, arm, seed) for seed in range(options.seeds)]
        accuracies = [cells[key]["accuracy"] for key in keys]
        found[arm] = {"accuracy": accuracies, "median": statistics.median(accuracies)}
        shown = ", ".join(f"{100 * accuracy:.1f}" for accuracy in accuracies)
        print(f"{arm:<22} {100 * statistics.median(accuracies):.1f} % (median), each {shown}")
    return {"minutes": options.minutes, "n_eval": options.n_eval, "arms": found}


if __name__ == "__main__":
    main()
