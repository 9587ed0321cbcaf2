"""One on-policy round against more imitation, at equal steps: a dense student of the pocket teacher's own tokenizer.

A student imitates until it solves some problems. From there each arm trains for the same number of steps: on the
teacher's traces of new problems (`imitation`), or on a round over the same problems, its samples taught by reverse KL,
forward KL or the policy gradient, or its own right answers and corrections alone (`off`). Same start, same seeds.

    python benchmarks/bench_rounds.py --out runs/bench-rounds

Each cell is saved as it ends (cells.json), and the same command goes on. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from deepdistill.distill.evaluation.evaluate import evaluate
from deepdistill.distill.graders.pool import Grader
from deepdistill.distill.problems.load import load_problems
from deepdistill.distill.recipe.gathering import TeacherRecipe, TracesRecipe
from deepdistill.distill.recipe.teach import ScoresRecipe, TeachRecipe
from deepdistill.distill.recipe.training import OnPolicyRecipe, TrainingRecipe
from deepdistill.distill.records import Trace
from deepdistill.distill.teach import teach
from deepdistill.distill.teachers import open_teacher, pocket_dir
from deepdistill.distill.teachers.huggingface.loading import load_tokenizer
from deepdistill.distill.traces.store import TraceStore
from deepdistill.distill.training.dataset import lessons
from deepdistill.distill.training.rows import order_rows
from deepdistill.distill.training.student import student_dir
from deepdistill.distill.training.train import TrainPaths, train
from deepdistill.localrun.core.atomic import write_text
from deepdistill.localrun.core.bars import Bars
from deepdistill.localrun.core.generation import Sampling

PROBLEMS = "gym:chain_sum?min_terms=2&max_terms=3&min_digits=1&max_digits=2"
ARMS = ("imitation", "reverse-kl", "forward-kl", "policy-gradient", "off")
MAX_TOKENS = 96


def score(folder: Path, n: int) -> dict[str, Any]:
    """Score a student on held-out problems."""
    with open_teacher(str(folder)) as model, Grader() as grader:
        held_out, sampling = load_problems(PROBLEMS, "test", n=n, seed=0), Sampling(max_tokens=MAX_TOKENS)
        found = evaluate(model, held_out, grader=grader, sampling=sampling)
    return vars(found)


def imitate(start: Path, traces: list[Trace], path: Path, settings: TrainingRecipe, out: Path, bars: Bars) -> None:
    """Train on right traces by cross-entropy."""
    tokenizer = load_tokenizer(pocket_dir())
    right = [trace for trace in traces if trace.verdict == "right"]
    rows, _ = lessons(right, path, tokenizer=tokenizer, training=TrainingRecipe(max_length=512, loss="cross-entropy"))
    out.parent.mkdir(parents=True, exist_ok=True)
    rows = order_rows(rows, settings.batch_size, epochs=settings.epochs, seed=settings.seed)
    paths = TrainPaths(start, out.parent / "checkpoints", out)
    train(paths, rows, tokenizer=tokenizer, settings=settings, report=bars)


def main() -> None:
    """Run what is not there yet and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--first-steps", type=int, default=400, help="of imitation before the arms part")
    parser.add_argument("--steps", type=int, default=150, help="of each arm")
    parser.add_argument("--n-traces", type=int, default=3000)
    parser.add_argument("--n-problems", type=int, default=500, help="new ones, of a round")
    parser.add_argument("--n-eval", type=int, default=200)
    parser.add_argument("--n-seeds", type=int, default=1)
    arguments = parser.parse_args()
    out: Path = arguments.out
    n_all = arguments.n_traces + arguments.n_problems
    shared = TrainingRecipe(weights="full", batch_size=32, epochs=1000, n_validation=0)
    cells_path = out / "cells.json"
    with Bars(quiet=False) as bars:
        gathered = TeachRecipe(
            problems=PROBLEMS, traces=TracesRecipe(n=n_all), teacher=TeacherRecipe(max_tokens=MAX_TOKENS)
        )
        teach(gathered, out / "traces", stop_after="traces", report=bars)
        path = out / "traces" / "traces.jsonl"
        traces, asked = list(TraceStore.read(path)), [p.id for p in load_problems(PROBLEMS, "train", n=n_all, seed=0)]
        old = set(asked[: arguments.n_traces])
        cells: dict[str, Any] = json.loads(cells_path.read_text()) if cells_path.exists() else {}
        for seed in range(arguments.n_seeds):
            start = out / f"start-{seed}" / "student"
            if f"start {seed}" not in cells:
                first = replace(shared, learning_rate=3e-3, steps=arguments.first_steps, seed=seed)
                known = [trace for trace in traces if trace.problem_id in old]
                imitate(student_dir("pocket"), known, path, first, start, bars)
                cells[f"start {seed}"] = score(start, arguments.n_eval)
                write_text(cells_path, json.dumps(cells, indent=1))
            for arm in ARMS:
                key, folder, began = f"{arm} {seed}", out / f"{arm}-{seed}", time.monotonic()
                if key in cells:
                    continue
                if arm == "imitation":
                    more = replace(shared, learning_rate=1.5e-3, steps=arguments.steps, seed=seed + 1)
                    new = [trace for trace in traces if trace.problem_id not in old]
                    imitate(start, new, path, more, folder / "student", bars)
                else:
                    if not (folder / "rounds" / "0" / "student").exists():
                        shutil.copytree(start, folder / "rounds" / "0" / "student")
                    settings = TeachRecipe(
                        PROBLEMS,
                        student=str(student_dir("pocket")),
                        traces=TracesRecipe(n=arguments.n_traces, file=path),
                        on_policy=OnPolicyRecipe(rounds=1, n_problems=arguments.n_problems, loss=arm),  # type: ignore[arg-type]
                        scores=ScoresRecipe(max_tokens=MAX_TOKENS),
                        seed=seed,
                        training=replace(shared, learning_rate=3e-3, steps=arguments.steps),  # a round halves it
                    )
                    teach(settings, folder, stop_after="training", report=bars)
                cells[key] = score(folder / "student", arguments.n_eval)
                cells[key]["minutes"] = (time.monotonic() - began) / 60  # of the process that ended it
                write_text(cells_path, json.dumps(cells, indent=1))
    for arm in ("start", *ARMS):
        found = [cells[f"{arm} {seed}"] for seed in range(arguments.n_seeds)]
        listed = ", ".join(f"{100 * cell['accuracy']:.1f}" for cell in found)
        print(f"{arm:<16} {100 * statistics.mean(c['accuracy'] for c in found):5.1f} %  ({listed})")
    print(json.dumps({"cells": cells, "settings": vars(arguments) | {"out": str(out)}}))


if __name__ == "__main__":
    main()
