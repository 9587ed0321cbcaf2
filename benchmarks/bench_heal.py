"""A student at 4.5 bits a weight, healed: how many of its answers are left, problem by problem.

Types are chosen under the budget, the file is written, then healed, and the unquantized student (F16), the plain file
and the healed one are asked the same held-out problems by llama.cpp. The paired interval and McNemar's exact test say
whether what flipped is more than chance. Bits a weight are all tensors' bytes times 8 over the student's parameters.

Every cell is saved as it is done, and what is there is not done again.

    python benchmarks/bench_heal.py RUN [--bpw 4.5] [--steps 32] [--n 500] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from deepdistill.distill.evaluation.evaluate import score_file
from deepdistill.distill.problems.load import load_problems
from deepdistill.distill.recipe.teach import TeachRecipe
from deepdistill.distill.training.losses import projected_kl
from deepdistill.localrun.core.reporter import Reporter
from deepdistill.quantize.choose.workbench import Workbench
from deepdistill.quantize.measure.paired import compare
from deepdistill.quantize.recipe import HealRecipe, QuantizeRecipe
from deepdistill.quantize.release import DistillStage, quantize, release

_MINUTES = {"plain": 1.0, "healed": 5.5, "f16": 0.2, "answers": 2.0, "divergence": 2.5}  # about, on 2 cores


def main() -> None:
    """Fill the cells and print them; one JSON object last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--bpw", type=float, default=4.5)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--n", type=int, default=500)
    parser.add_argument("--out", type=Path, default=Path("bench-heal"))
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no cell that would end after this")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"heal-{arguments.bpw:g}-{arguments.steps}.json"
    cells: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    deadline = time.monotonic() + 60 * arguments.minutes
    files = {name: arguments.out / f"{name}.gguf" for name in ("plain", "healed", "f16")}

    def cell(name: str, make: Callable[[], Any]) -> None:
        if name in cells:
            return
        if time.monotonic() + 60 * _MINUTES[name.partition(" ")[2] or name] > deadline:
            raise SystemExit(f"the time is over before {name}; run it again, it resumes from here")
        started = time.monotonic()
        cells[name] = make() | {"wall_seconds": round(time.monotonic() - started, 1)}
        path.write_text(json.dumps(cells, indent=1))
        print(name, {k: v for k, v in cells[name].items() if k != "right"}, flush=True)

    cell("healed", lambda: make_file(arguments.run, files["healed"], arguments.bpw, arguments.steps))
    cell("f16", lambda: {"bytes": quantize(arguments.run / "student", files["f16"], ftype="F16").n_bytes})
    cell("f16 answers", lambda: ask(arguments.run, files["f16"], arguments.n))
    cell("healed answers", lambda: ask(arguments.run, files["healed"], arguments.n))
    report(cells, "healed")
    cell("plain", lambda: make_file(arguments.run, files["plain"], arguments.bpw, 0))
    cell("plain answers", lambda: ask(arguments.run, files["plain"], arguments.n))
    report(cells, "plain")
    cell("divergence", lambda: measure(arguments.run, arguments.out, (files["healed"], files["plain"])))
    path.write_text(json.dumps(cells, indent=1))
    print(json.dumps({name: {k: v for k, v in one.items() if k != "right"} for name, one in cells.items()}))


def report(cells: dict[str, Any], name: str) -> None:
    """Compare a file's answers with the unquantized model's."""
    paired = compare(cells["f16 answers"]["right"], cells[f"{name} answers"]["right"])
    cells[f"{name} paired"] = paired.to_json()
    print(name, json.dumps(paired.to_json()), flush=True)


def make_file(run: Path, out: Path, bpw: float, steps: int) -> dict[str, Any]:
    """Return a file's size and what healing came to."""

    class Printed(Reporter):
        def progress(self, stage: str, done: float, *, total: float, note: str = "") -> None:
            if (stage in ("healing", "measuring tensors") and int(done) % 10 == 0) or stage == "measuring types":
                print(f"  {stage} {done:.0f} of {total:.0f}: {note}", flush=True)

    settings = QuantizeRecipe(bpw=bpw, heal=HealRecipe(steps), traces=run / "traces.jsonl", fidelity=False)
    made = release(
        run / "student", out, settings=settings, stage=DistillStage(divergence=projected_kl), report=Printed()
    )
    return {
        "bytes": made.report.n_bytes,
        "bits_per_weight": made.report.bits_per_weight,
        "healed": dict(made.healed or {}),
    }


def measure(run: Path, out: Path, paths: Sequence[Path]) -> dict[str, Any]:
    """Return the fidelity of files on held-out traces."""
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        bench = Workbench(
            run / "student",
            Path(scratch),
            out,
            QuantizeRecipe(type="Q4_K_M", traces=run / "traces.jsonl"),
        )
        return {path.stem: bench.fidelity(path).to_json() for path in paths}


def ask(run: Path, file: Path, n: int) -> dict[str, Any]:
    """Return which held-out problems a file answers right."""
    settings = TeachRecipe.of_run(run)
    problems = load_problems(settings.problems, "test", n=n, seed=settings.seed)
    answers = file.with_suffix(".answers.jsonl")
    score = score_file(file, problems, max_tokens=settings.scores.max_tokens, answers_path=answers)
    lines = [json.loads(line) for line in answers.read_text().splitlines()]
    return vars(score) | {"right": [line["verdict"] == "right" for line in lines]}


if __name__ == "__main__":
    main()
