"""Teach SmolLM2-135M gsm_symbolic from its own worked answers, and score it on templates it saw and never saw.

gsm_symbolic fills 85 templates with numbers and names. A held-out question of a trained template says little
of a new story, so a fifth of the templates is left out of the training whole, and both numbers are reported: held-out
questions of seen templates, and questions of unseen ones. Three draws of problems for each; base and student alike.

    python benchmarks/bench_gsm.py --out runs/gsm --minutes 60

Each cell is saved as it ends (cells.json), and the same command goes on. The last line is JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import statistics
from pathlib import Path
from typing import Any

import reasoning_gym

from deepdistill.distill.evaluation.evaluate import evaluate
from deepdistill.distill.graders.pool import Grader
from deepdistill.distill.problems.load import load_problems
from deepdistill.distill.problems.split import bucket_of
from deepdistill.distill.recipe.gathering import CurationRecipe, TeacherRecipe, TracesRecipe
from deepdistill.distill.recipe.teach import ScoresRecipe, TeachRecipe
from deepdistill.distill.recipe.training import TrainingRecipe
from deepdistill.distill.teach import teach
from deepdistill.distill.teachers import open_teacher
from deepdistill.distill.training.student import student_dir
from deepdistill.localrun.core.atomic import write_text
from deepdistill.localrun.core.bars import Bars
from deepdistill.localrun.core.generation import Sampling

HELD_OUT_SHARE = 0.2


def is_held_out(template: int) -> bool:
    """Say whether a template is left out of the training: a fixed hash, so that every run agrees."""
    return hashlib.sha256(f"gsm_symbolic {template}".encode()).digest()[0] < 256 * HELD_OUT_SHARE


def write_problems(folder: Path, n: int, seed: int) -> dict[str, int]:
    """Draw n questions, and write those of seen and of unseen templates each to a file; return what they hold."""
    data = reasoning_gym.create_dataset("gsm_symbolic", seed=seed, size=n)
    lines: dict[str, dict[str, str]] = {"seen": {}, "unseen": {}}
    templates: dict[str, set[int]] = {"seen": set(), "unseen": set()}
    for index, template in enumerate(data.task_indices):  # which generator makes item `index`
        item = data[index]
        name = "unseen" if is_held_out(template) else "seen"
        templates[name].add(template)
        record = {"question": item["question"], "answer": item["answer"], "grader": "number", "template": template}
        lines[name][item["question"]] = json.dumps(record | {"worked": item["metadata"]["answer_cot"]})
    for name, rows in lines.items():
        write_text(folder / f"{name}.jsonl", "".join(f"{line}\n" for line in rows.values()))
    return {f"{name}_templates": len(found) for name, found in templates.items()}


def score(model: Path, problems_path: Path, n: int, seed: int, max_tokens: int, hop: str, bars: Bars) -> dict[str, Any]:
    """Score a model on n test questions of a file, drawn by a seed."""
    everything = load_problems(str(problems_path), "test")
    assert all(bucket_of(problem.question) == "test" for problem in everything)
    drawn = random.Random(seed).sample(everything, min(n, len(everything)))
    with open_teacher(str(model)) as teacher, Grader() as grader:
        sampling = Sampling(max_tokens=max_tokens)
        found = evaluate(teacher, drawn, grader=grader, sampling=sampling, report=bars, stage=f"{hop} {seed}")
    return vars(found)


def main() -> None:
    """Run what is not there yet and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--student", default="smollm2")
    parser.add_argument("--n-problems", type=int, default=12_000)
    parser.add_argument("--n-eval", type=int, default=200)
    parser.add_argument("--n-samples", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--train-batch-size", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    cells_path = out / "cells.json"
    cells: dict[str, Any] = json.loads(cells_path.read_text()) if cells_path.exists() else {}
    if "templates" not in cells:
        cells["templates"] = write_problems(out, arguments.n_problems, arguments.seed)
        write_text(cells_path, json.dumps(cells, indent=1))
    settings = TeachRecipe(
        problems=str(out / "seen.jsonl"),
        teacher=TeacherRecipe(model="worked"),
        student=arguments.student,
        traces=TracesRecipe(n=arguments.n_problems),
        scores=ScoresRecipe(n=arguments.n_eval),
        seed=arguments.seed,
        training=TrainingRecipe(
            minutes=arguments.minutes,
            epochs=100,
            batch_size=arguments.train_batch_size,
            weights="full" if arguments.student == "pocket" else "lora",
        ),
        curation=CurationRecipe(similarity=1.0, contamination_ngram=None),
    )
    with Bars(quiet=False) as bars:
        result = teach(settings, out / "run", stop_after="training", report=bars)
        assert result.student_dir is not None
        models = {"student": result.student_dir, "base": student_dir(arguments.student)}
        for hop, model in models.items():
            for name in ("seen", "unseen"):
                for sample in range(arguments.n_samples):
                    key = f"{hop} {name} {sample}"
                    if key not in cells:
                        file = out / f"{name}.jsonl"
                        cells[key] = score(
                            model, file, arguments.n_eval, sample, arguments.max_tokens, f"{hop}, {name}", bars
                        )
                        write_text(cells_path, json.dumps(cells, indent=1))
    table = {
        f"{hop} {name}": [cells[f"{hop} {name} {i}"]["accuracy"] for i in range(arguments.n_samples)]
        for hop in models
        for name in ("seen", "unseen")
    }
    for row, accuracies in table.items():
        listed = ", ".join(f"{100 * a:.1f}" for a in accuracies)
        print(f"{row:<16} {100 * statistics.mean(accuracies):5.1f} %   ({listed})")
    print(json.dumps({"cells": cells, "training": result.training, "curation": result.curation["dropped"]}))


if __name__ == "__main__":
    main()
