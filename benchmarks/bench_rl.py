"""Reinforcement, small: what it does to a pocket teacher, and whether a tiny student had better been distilled.

    python benchmarks/bench_rl.py r1 --out runs/bench-r1          # V3 to R1
    python benchmarks/bench_rl.py small --out runs/bench-small    # distilled against RL alone

`r1` stops the pocket teacher's recipe early (in stages, until `--least` of its held-out problems are right), continues
by GRPO alone, and measures accuracy (greedy, and sampled at temperature 1, as it trains), answer length and the load
of the experts before and after. `--start DIR` takes an existing checkpoint. `small` warms a tiny dense student up
until `--least` are right, then trains it for the same minutes twice: on the pocket teacher's traces (the time that
these took counts), and by GRPO (its sampling counts). Accuracy, greedy and sampled, is taken after each of equal
parts, so that both curves stand over compute.

Each cell is saved as it ends (cells.json), and the same command resumes. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from deepdistill.distill.evaluation.evaluate import evaluate
from deepdistill.distill.graders.pool import Grader
from deepdistill.distill.problems.load import load_problems
from deepdistill.distill.recipe.gathering import TeacherRecipe, TracesRecipe
from deepdistill.distill.recipe.teach import TeachRecipe
from deepdistill.distill.recipe.training import TrainingRecipe
from deepdistill.distill.records import Problem
from deepdistill.distill.teach import teach
from deepdistill.distill.teachers import open_teacher, pocket_dir
from deepdistill.distill.teachers.huggingface.loading import load_tokenizer
from deepdistill.distill.traces.store import TraceStore
from deepdistill.distill.training.dataset import lessons
from deepdistill.distill.training.pass_rate import measure_pass_rates
from deepdistill.distill.training.rl.grpo import GrpoSettings, grpo
from deepdistill.distill.training.rl.stage import sometimes_solved
from deepdistill.distill.training.rows import Row, order_rows
from deepdistill.distill.training.student import student_dir
from deepdistill.distill.training.train import TrainPaths, train
from deepdistill.localrun.core.atomic import write_text
from deepdistill.localrun.core.bars import Bars
from deepdistill.localrun.core.generation import Sampling

PROBLEMS = "gym:chain_sum?min_terms=2&max_terms=3&min_digits=1&max_digits=2"
_RL_TOKENS = 96  # of a sampled answer to them


class Cells:
    """What is done, on the disk after each."""

    def __init__(self, folder: Path) -> None:
        """Read what is there."""
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "cells.json"
        self.done: dict[str, Any] = json.loads(self._path.read_text()) if self._path.exists() else {}

    def __contains__(self, key: str) -> bool:
        return key in self.done

    def save(self, key: str, value: Any) -> None:
        """Keep a cell."""
        self.done[key] = value
        write_text(self._path, json.dumps(self.done, indent=1))


def grpo_settings(arguments: argparse.Namespace, minutes: float, max_tokens: int, seed: int) -> GrpoSettings:
    """Return GRPO's settings, boxed in time."""
    return GrpoSettings(
        steps=10**6,
        minutes=minutes,
        problems_per_step=arguments.problems_per_step,
        max_tokens=max_tokens,
        lr=arguments.lr,
        seed=seed,
    )


def run_r1(arguments: argparse.Namespace, cells: Cells, bars: Bars) -> None:
    """V3 to R1."""
    sys.path.insert(0, str(Path(__file__).parent / "pocket"))  # its scripts import each other by their plain names
    from reinforce import LONGEST, measure, reinforce
    from train import Recipe
    from train import train as train_pocket

    out: Path = arguments.out
    early = arguments.start or out / "early"
    found = cells.done.get("before", {"accuracy": 0.0})
    while arguments.start is None and found["accuracy"] < arguments.least:
        stage = found.get("stage", 0) + 1
        if stage > arguments.most_stages:
            raise SystemExit(f"{100 * found['accuracy']:.1f} % after {stage - 1} stages: give more --stage-minutes")
        recipe = Recipe(minutes=arguments.stage_minutes, peak_lr=3e-3 if stage == 1 else 2e-3, seed=stage - 1)
        train_pocket(recipe, early, early if stage > 1 else None)
        found = measure(early, arguments.n_eval) | {"stage": stage}
        cells.save("before", found)
    if "before" not in cells:
        cells.save("before", measure(early, arguments.n_eval))
    settings = grpo_settings(arguments, arguments.minutes, LONGEST, arguments.seed)
    if "after" not in cells:
        report = reinforce(early, out / "reinforced", settings=settings, report=bars)
        cells.save("after", measure(out / "reinforced", arguments.n_eval) | {"report": asdict(report)})
    for name in ("before", "after"):
        cell = cells.done[name]
        families = ", ".join(f"{family} {100 * s['accuracy']:.1f}" for family, s in cell["families"].items())
        print(
            f"{name:<7} {100 * cell['accuracy']:5.1f} % ({families}), sampled {100 * cell['sampled']:.1f} %  "
            f"{cell['tokens_per_answer']:.1f} tokens, "
            f"experts {cell['idlest_expert']:.2f} to {cell['busiest_expert']:.2f} of the mean"
        )


def accuracy_of(folder: Path, n: int) -> dict[str, float]:
    """Score a student on held-out problems."""
    problems = load_problems(PROBLEMS, "test", n=n, seed=0)
    with open_teacher(str(folder)) as model, Grader() as grader:
        score = evaluate(model, problems, grader=grader, sampling=Sampling(max_tokens=128))
        drawn = evaluate(model, problems * 4, grader=grader, sampling=Sampling(temperature=1.0, max_tokens=128))
    found = {"accuracy": score.accuracy, "sampled": drawn.accuracy}
    return found | {"tokens_per_answer": score.tokens_per_answer, "looped": score.looped}


def rows_of(traces_path: Path) -> list[Row]:
    """Return the right traces as rows."""
    right = [trace for trace in TraceStore.read(traces_path) if trace.verdict == "right"]
    tokenizer = load_tokenizer(pocket_dir())
    rows, _ = lessons(right, traces_path, tokenizer=tokenizer, training=TrainingRecipe(max_length=512))
    return rows


def problems_of(start: Path, n: int, cells: Cells) -> tuple[list[Problem], float]:
    """Return the training problems that the student solves now and then, and the minutes that finding them took."""
    problems = load_problems(PROBLEMS, "train", n=n, seed=1)
    if "chosen" not in cells:
        began = time.monotonic()
        sampling = Sampling(temperature=1.0, max_tokens=_RL_TOKENS)
        with open_teacher(str(start), batch_size=256) as model, Grader() as grader:
            chosen = sometimes_solved(
                problems, measure_pass_rates(model, problems, grader=grader, sampling=sampling, n_tries=4)
            )
        cells.save("chosen", {"ids": [p.id for p in chosen], "minutes": (time.monotonic() - began) / 60})
    found = cells.done["chosen"]
    ids = set(found["ids"])
    return [problem for problem in problems if problem.id in ids], found["minutes"]


def run_small(arguments: argparse.Namespace, cells: Cells, bars: Bars) -> None:
    """Distilled against RL alone."""
    out: Path = arguments.out
    tokenizer = load_tokenizer(pocket_dir())
    if "traces" not in cells:
        began = time.monotonic()
        gathered = TeachRecipe(
            problems=PROBLEMS, traces=TracesRecipe(n=arguments.n_traces), teacher=TeacherRecipe(max_tokens=128)
        )
        teach(gathered, out / "traces", stop_after="traces", report=bars)
        cells.save("traces", {"minutes": (time.monotonic() - began) / 60})
    rows = rows_of(out / "traces" / "traces.jsonl")
    start = out / "start"
    while (found := cells.done.get("start", {"accuracy": 0.0}))["accuracy"] < arguments.least:
        part = found.get("parts", 0) + 1
        # The warm-up is the same for both arms: it is not counted.
        settings = TrainingRecipe(
            weights="full", learning_rate=0.003, batch_size=32, steps=arguments.warm_steps, epochs=1000, seed=part
        )
        paths = TrainPaths(start if part > 1 else student_dir("pocket"), out / f"warm-{part}", start)
        ordered = order_rows(rows, settings.batch_size, epochs=settings.epochs, seed=part)
        train(paths, ordered, tokenizer=tokenizer, settings=settings, report=bars)
        cells.save("start", accuracy_of(start, arguments.n_eval) | {"parts": part})
    part_minutes = arguments.minutes / arguments.n_parts
    for arm in ("distilled", "reinforced"):
        model, spent, sampled, learned = start, 0.0, 0, 0
        if arm == "distilled":
            spent = cells.done["traces"]["minutes"]
        else:
            problems, spent = problems_of(start, arguments.n_traces, cells)
        for part in range(1, arguments.n_parts + 1):
            key, target = f"{arm} {part}", out / f"{arm}-{part}"
            if key not in cells:
                began = time.monotonic()
                if arm == "distilled":
                    box = TrainingRecipe(
                        weights="full",
                        learning_rate=0.001,
                        batch_size=32,
                        epochs=1000,
                        minutes=part_minutes,
                        n_validation=0,
                        seed=part,
                    )
                    paths = TrainPaths(model, out / f"{key}-checkpoints", target)
                    ordered = order_rows(rows, box.batch_size, epochs=box.epochs, seed=part)
                    report = train(paths, ordered, tokenizer=tokenizer, settings=box, report=bars)
                    learned += report.tokens
                else:
                    # Choosing problems took of the first part's minutes.
                    left = part_minutes - (spent if part == 1 else 0)
                    options = grpo_settings(arguments, left, _RL_TOKENS, part)
                    with Grader() as grader:
                        report_rl = grpo(
                            TrainPaths(model, out / f"{key}-checkpoints", target),
                            problems,
                            tokenizer=tokenizer,
                            grader=grader,
                            settings=options,
                            report=bars,
                        )
                    sampled += report_rl.sampled_tokens
                    learned += report_rl.sampled_tokens
                spent += (time.monotonic() - began) / 60
                cell = {"minutes": round(spent, 2), "sampled_tokens": sampled, "learned_tokens": learned}
                cells.save(key, accuracy_of(target, arguments.n_eval) | cell)
            model, spent = target, cells.done[key]["minutes"]
            sampled, learned = cells.done[key]["sampled_tokens"], cells.done[key]["learned_tokens"]
    print(f"start       {100 * cells.done['start']['accuracy']:5.1f} %")
    for arm in ("distilled", "reinforced"):
        found = [cells.done[f"{arm} {part}"] for part in range(1, arguments.n_parts + 1)]
        shown = (f"{100 * c['accuracy']:.1f} % ({100 * c['sampled']:.1f}) at {c['minutes']:.1f} min" for c in found)
        print(f"{arm:<11} " + ", ".join(shown))


def main() -> None:
    """Run what is not there yet and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["r1", "small"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start", type=Path, help="r1: a checkpoint that was stopped early")
    parser.add_argument("--minutes", type=float, default=20.0, help="of reinforcement, and of distillation")
    parser.add_argument("--least", type=float, help="accuracy to begin with (r1: 0.4, small: 0.15)")
    parser.add_argument("--stage-minutes", type=float, default=8.0, help="r1: of the recipe, until it is stopped early")
    parser.add_argument("--most-stages", type=int, default=6)
    parser.add_argument("--warm-steps", type=int, default=150, help="small: steps of the warm-up's parts")
    parser.add_argument("--n-parts", type=int, default=4)
    parser.add_argument("--n-traces", type=int, default=4000)
    parser.add_argument("--n-eval", type=int, default=200)
    parser.add_argument("--lr", type=float, default=2e-4, help="of GRPO")
    parser.add_argument("--problems-per-step", type=int, default=64, help="of GRPO, 8 answers to each")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.least is None:
        arguments.least = 0.4 if arguments.part == "r1" else 0.15
    cells = Cells(arguments.out)
    with Bars(quiet=False) as bars:
        (run_r1 if arguments.part == "r1" else run_small)(arguments, cells, bars)
    print(json.dumps({"cells": cells.done}))


if __name__ == "__main__":
    main()
