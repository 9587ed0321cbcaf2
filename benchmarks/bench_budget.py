"""The best types under a size against llama.cpp's recipes of that size, with the same importance matrix.

For each recipe (Q4_K_M, Q4_0, Q3_K_M) a file is quantized with it, then one with chosen types whose size is at most
that file's, and both are run by llama.cpp on the same held-out traces. The traces are in three parts without a common
problem: one makes the importance matrix, one chooses the types, one is read here. The recipe's file holds byte for
byte what llama.cpp's quantizer writes (tests/quantize/test_ftypes.py and compare_converter.py check that).

Every cell is saved as it is done, and what is there is not done again: run it as often as need be.

    python benchmarks/bench_budget.py RUN [--recipes Q4_K_M,Q4_0,Q3_K_M] [--out FOLDER] [--minutes 7]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from deepdistill.localrun.hardware import default_threads
from deepdistill.quantize.calibration import CalibrationSettings
from deepdistill.quantize.convert import plan, write
from deepdistill.quantize.desk import Desk
from deepdistill.quantize.release import ReleaseSettings, release


def main() -> None:
    """Fill the cells and print them; one JSON object last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder with student/ and traces.jsonl")
    parser.add_argument("--recipes", default="Q4_K_M,Q4_0,Q3_K_M")
    parser.add_argument("--out", type=Path, default=Path("bench-budget"))
    parser.add_argument("--minutes", type=float, default=1e9, help="stop measuring single tensors after this")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    cells_path = arguments.out / "cells.json"
    cells: dict[str, Any] = json.loads(cells_path.read_text()) if cells_path.exists() else {}
    deadline = time.monotonic() + 60 * arguments.minutes
    for recipe in arguments.recipes.split(","):
        if recipe not in cells:
            started = time.monotonic()
            cells[recipe] = compare(arguments.run, arguments.out, recipe, deadline)
            cells[recipe]["seconds"] = round(time.monotonic() - started, 1)
            cells_path.write_text(json.dumps(cells, indent=1))
        show(recipe, cells[recipe])
    print(json.dumps(cells))


def compare(run: Path, out: Path, recipe: str, deadline: float) -> dict[str, Any]:
    """Return both files' bytes and fidelity."""

    def progress(stage: str, done: float, total: float, note: str = "") -> None:
        if stage.startswith("measuring") and note.endswith("nats") and int(done) % 20 == 0:
            print(f"  {stage} {done:.0f} of {total:.0f}: {note}", flush=True)
            if time.monotonic() > deadline:
                raise SystemExit("the time is over; run it again, it goes on from here")

    student, traces = run / "student", run / "traces.jsonl"
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        desk = Desk(
            student, Path(scratch), out, traces, None, CalibrationSettings(), default_threads(), lambda *_: None
        )
        path = Path(scratch) / f"{recipe}.gguf"
        write(plan(student, recipe, importance=desk.importance), path, {}, lambda *_: None, desk.n_threads)
        theirs, n_bytes = desk.fidelity(path).to_json(), path.stat().st_size
        path.unlink()
    settings = ReleaseSettings(size=n_bytes + 8192, traces=traces)  # room for what our file says of itself
    made = release(student, out / f"at-{recipe}.gguf", settings, on_progress=progress)
    assert made.fidelity is not None
    ours = made.fidelity.to_json()
    return {
        "recipe_bytes": n_bytes,
        "our_bytes": made.report.n_bytes,
        "recipe": theirs,
        "ours": ours,
        "ratio": round(ours["kl_mean"] / theirs["kl_mean"], 3),
        "types": [f"{one['tensor']} {one['type']}" for one in made.choices],
    }


def show(recipe: str, cell: dict[str, Any]) -> None:
    """Print a line a file."""
    for name, n_bytes, kl in (
        (recipe, cell["recipe_bytes"], cell["recipe"]),
        ("chosen", cell["our_bytes"], cell["ours"]),
    ):
        print(
            f"{name:8} {n_bytes:>12,} bytes  KL {kl['kl_mean']:.4f} ± {kl['kl_error']:.4f}  99 % {kl['kl_p99']:.3f}  "
            f"same top {100 * kl['same_top']:.2f} %"
        )
    print(f"         {cell['ratio']:.2f} times the recipe's divergence", flush=True)


if __name__ == "__main__":
    main()
