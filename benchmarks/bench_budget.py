"""The best types under a size against llama.cpp's recipes of that size, with the same importance matrix.

For each recipe (Q4_0, Q4_K_M, Q3_K_M) a file is quantized with it, then one with chosen types whose size is at most
that file's, and both are run by llama.cpp on the same held-out traces. The traces are in three parts without a common
problem: one makes the importance matrix, one chooses the types, one is read here. The recipe's file holds byte for
byte what llama.cpp's quantizer writes (tests/quantize/convert/test_ftypes.py and compare_converter.py check that).

Every cell is saved as it is done, and what is there is not done again: run it as often as need be.

    python benchmarks/bench_budget.py RUN [--recipes Q4_0,Q4_K_M,Q3_K_M] [--out FOLDER] [--minutes 7]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from deepdistill.localrun.core.reporter import Reporter
from deepdistill.quantize.choose.workbench import Workbench
from deepdistill.quantize.convert.writer import write
from deepdistill.quantize.recipe import QuantizeRecipe
from deepdistill.quantize.release import release


def main() -> None:
    """Fill the cells and print them; one JSON object last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder with student/ and traces.jsonl")
    parser.add_argument("--recipes", default="Q4_0,Q4_K_M,Q3_K_M")
    parser.add_argument("--out", type=Path, default=Path("bench-budget"))
    parser.add_argument("--minutes", type=float, default=1e9, help="stop measuring single tensors after this")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    cells_path = arguments.out / "cells.json"
    cells: dict[str, Any] = json.loads(cells_path.read_text()) if cells_path.exists() else {}
    deadline = time.monotonic() + 60 * arguments.minutes
    with tempfile.TemporaryDirectory(dir=arguments.out) as scratch:
        bench = Workbench(
            arguments.run / "student",
            Path(scratch),
            arguments.out,
            QuantizeRecipe(type="Q4_K_M", traces=arguments.run / "traces.jsonl"),
        )
        for recipe in arguments.recipes.split(","):
            for name in (f"{recipe} recipe", f"{recipe} chosen"):
                if name not in cells:
                    if time.monotonic() > deadline:
                        raise SystemExit("the time is over; run it again, it resumes from here")
                    started = time.monotonic()
                    if name.endswith("recipe"):
                        cells[name] = by_recipe(bench, recipe)
                    else:
                        cells[name] = chosen(bench, recipe, cells[f"{recipe} recipe"]["bytes"], deadline)
                    cells[name]["seconds"] = round(time.monotonic() - started, 1)
                    cells_path.write_text(json.dumps(cells, indent=1))
                show(name, cells[name])
            ratio = cells[f"{recipe} chosen"]["kl_mean"] / cells[f"{recipe} recipe"]["kl_mean"]
            print(f"{recipe}: {ratio:.3f} times the recipe's divergence", flush=True)
            cells[f"{recipe} ratio"] = {"ratio": round(ratio, 4)}
    print(json.dumps(cells))


def by_recipe(bench: Workbench, recipe: str) -> dict[str, Any]:
    """Return the bytes and the fidelity of a file by a recipe of llama.cpp's."""
    path = bench.scratch_dir / f"{recipe}.gguf"
    write(bench.plan(recipe, importance=bench.importance), path, n_threads=bench.n_threads)
    found = {"bytes": path.stat().st_size} | bench.fidelity(path).to_json()
    path.unlink()
    return found


def chosen(bench: Workbench, recipe: str, n_bytes: int, deadline: float) -> dict[str, Any]:
    """Return the bytes, the fidelity and the types of a file of that size."""

    class Printed(Reporter):
        def progress(self, stage: str, done: float, *, total: float, note: str = "") -> None:
            if note.endswith(("nats", "one by one")) and (int(done) % 10 == 0 or "tensors:" in note):
                print(f"  {stage} {done:.0f} of {total:.0f}: {note}", flush=True)
            if note.endswith(("nats", "one by one")) and time.monotonic() > deadline:
                raise SystemExit("the time is over; run it again and it resumes from here")

    settings = QuantizeRecipe(size=n_bytes, traces=bench.settings.traces, fidelity=False)
    made = release(bench.student_dir, bench.kept_dir / f"at-{recipe}.gguf", settings=settings, report=Printed())
    types = [f"{one['tensor']} {one['type']} {one['nats']:.2g}" for one in made.choices]
    return {"bytes": made.report.n_bytes, "types": types} | bench.fidelity(made.report.path).to_json()


def show(name: str, cell: dict[str, Any]) -> None:
    """Print a line a file."""
    print(
        f"{name:16} {cell['bytes']:>12,} bytes  KL {cell['kl_mean']:.4f} ± {cell['kl_error']:.4f}  "
        f"99 % {cell['kl_p99']:.3f}  same top {100 * cell['same_top']:.2f} %  {cell['seconds']} s",
        flush=True,
    )


if __name__ == "__main__":
    main()
