"""Offline logit distillation against cross-entropy alone, at equal steps; and its loss against dense KL.

The pocket teacher answers once, with 64 log-probabilities a token kept. A student with its tokenizer is then trained on
the same rows in the same order, with cross-entropy and with the stored distribution, from the same start: `pruned`, the
teacher without one of its four layers, which a few minutes heal, or `dense`, random weights, which takes an hour.
Reported: accuracy on held-out problems, and how far the loss from the sidecar is from dense KL with the teacher in
memory, on the trained students.

    python benchmarks/bench_logits.py --out runs/bench-logits

Each cell is saved as it ends (cells.json), and the same command goes on. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from deepdistill.distill.evaluation.evaluate import evaluate
from deepdistill.distill.graders.pool import Grader
from deepdistill.distill.problems.load import load_problems
from deepdistill.distill.recipe.gathering import TeacherRecipe, TracesRecipe
from deepdistill.distill.recipe.teach import TeachRecipe
from deepdistill.distill.recipe.training import TrainingRecipe
from deepdistill.distill.records import Trace
from deepdistill.distill.teach import teach
from deepdistill.distill.teachers import open_teacher, pocket_dir
from deepdistill.distill.teachers.huggingface.loading import load_tokenizer
from deepdistill.distill.traces.store import TraceStore
from deepdistill.distill.training.dataset import lessons
from deepdistill.distill.training.lora import load_base
from deepdistill.distill.training.losses import LOSSES, Head, projected_loss
from deepdistill.distill.training.packing import pad
from deepdistill.distill.training.rows import Row, order_rows
from deepdistill.distill.training.student import student_dir
from deepdistill.distill.training.train import TrainPaths, train
from deepdistill.localrun.core.atomic import write_text
from deepdistill.localrun.core.bars import Bars
from deepdistill.localrun.core.generation import Sampling

PROBLEMS = "gym:chain_sum?min_terms=2&max_terms=3&min_digits=1&max_digits=2"
SHARES = {"cross-entropy": 0.0, "logits": 1.0, "mixed": 0.5}


def make_pruned(out: Path, layer: int = 2) -> Path:
    """Write the pocket teacher without one layer to a folder, and return it."""
    if not out.exists():
        whole = load_base(pocket_dir(), torch.float32)
        state, config = {}, whole.config
        for name, tensor in whole.state_dict().items():
            parts = name.split(".")
            if parts[1] == "layers":
                if int(parts[2]) == layer:
                    continue
                parts[2] = str(int(parts[2]) - (int(parts[2]) > layer))
            state[".".join(parts)] = tensor
        config.num_hidden_layers -= 1
        pruned = type(whole)(config)
        pruned.load_state_dict(state)
        pruned.generation_config = whole.generation_config
        pruned.save_pretrained(out)
        load_tokenizer(pocket_dir()).save_pretrained(out)
    return out


def make_rows(traces_path: Path, share: float) -> list[Row]:
    """Return the rows of all right traces, with forward KL as `share` of their loss."""
    traces: list[Trace] = [trace for trace in TraceStore.read(traces_path) if trace.verdict == "right"]
    training = TrainingRecipe(max_length=512, loss="logits" if share else "cross-entropy", logit_share=share)
    rows, _ = lessons(traces, traces_path, tokenizer=load_tokenizer(pocket_dir()), training=training)
    return rows


@torch.no_grad()
def kl_of(student: Path, rows: list[Row]) -> tuple[float, float]:
    """Return (KL from the sidecar's 64 and their tail, KL over the whole vocabulary with the teacher in memory)."""
    tokenizer = load_tokenizer(pocket_dir())
    pupil, teacher = load_base(student, torch.float32), load_base(pocket_dir(), torch.float32)
    batch = pad(rows, tokenizer.pad_token_id)
    hidden = pupil.get_decoder()(input_ids=batch.input_ids).last_hidden_state.flatten(0, 1)[batch.positions]
    sparse = (
        projected_loss(
            hidden, Head(pupil.lm_head.weight), targets=batch.targets, segments=batch.segments, losses=LOSSES
        )
        / batch.weight
    )
    p, q = (
        F.log_softmax(model(input_ids=batch.input_ids).logits.flatten(0, 1)[batch.positions].float(), -1)
        for model in (teacher, pupil)
    )
    return float(sparse), float((p.exp() * (p - q)).sum(-1).mean())


def listed(cells: list[dict[str, Any]]) -> str:
    """Return each seed's accuracy."""
    return ", ".join(f"{100 * cell['accuracy']:.1f}" for cell in cells)


def main() -> None:
    """Run what is not there yet and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--student", choices=["pruned", "dense"], default="pruned")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--n-traces", type=int, default=4000)
    parser.add_argument("--n-eval", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--n-seeds", type=int, default=1)
    arguments = parser.parse_args()
    out: Path = arguments.out
    gathered = TeachRecipe(
        problems=PROBLEMS,
        traces=TracesRecipe(n=arguments.n_traces),
        teacher=TeacherRecipe(temperature=arguments.temperature, logprobs=64, max_tokens=128),
    )
    with Bars(quiet=False) as bars:
        teach(gathered, out / "traces", stop_after="traces", report=bars)
        traces_path, cells_path = out / "traces" / "traces.jsonl", out / "cells.json"
        cells: dict[str, Any] = json.loads(cells_path.read_text()) if cells_path.exists() else {}
        held_out = load_problems(PROBLEMS, "test", n=arguments.n_eval, seed=0)
        tokenizer = load_tokenizer(pocket_dir())
        start = student_dir("pocket") if arguments.student == "dense" else make_pruned(out / "pruned")
        if "start" not in cells:
            with open_teacher(str(start)) as model, Grader() as grader:
                cells["start"] = vars(evaluate(model, held_out, grader=grader, sampling=Sampling(max_tokens=128)))
        for seed in range(arguments.n_seeds):
            for name, share in SHARES.items():
                key, folder = f"{name} {seed}", out / f"{name}-{seed}"
                if key in cells:
                    continue
                settings = TrainingRecipe(
                    weights="full",
                    learning_rate=arguments.lr,
                    batch_size=arguments.batch_size,
                    steps=arguments.steps,
                    epochs=1000,
                    n_validation=0,
                    seed=seed,
                )
                rows = make_rows(traces_path, share)
                rows = order_rows(rows, settings.batch_size, epochs=settings.epochs, seed=seed)
                paths = TrainPaths(start, folder / "checkpoints", folder / "student")
                report = train(paths, rows, tokenizer=tokenizer, settings=settings, report=bars)
                with open_teacher(str(folder / "student")) as model, Grader() as grader:
                    score = evaluate(model, held_out, grader=grader, sampling=Sampling(max_tokens=128))
                sparse, dense = kl_of(folder / "student", make_rows(traces_path, 1.0)[:256])
                cells[key] = {
                    "accuracy": score.accuracy,
                    "interval": score.interval,
                    "looped": score.looped,
                    "closed": score.closed,
                    "steps": report.steps,
                    "minutes": report.minutes,
                    "sparse_kl": sparse,
                    "dense_kl": dense,
                }
                write_text(cells_path, json.dumps(cells, indent=1))
    print(f"start          accuracy {100 * cells['start']['accuracy']:5.1f} %")
    for name in SHARES:
        found = [cells[f"{name} {seed}"] for seed in range(arguments.n_seeds)]
        print(
            f"{name:<14} accuracy {100 * statistics.mean(c['accuracy'] for c in found):5.1f} % "
            f"({listed(found)})  "
            f"KL offline {statistics.mean(c['sparse_kl'] for c in found):.4f} "
            f"online {statistics.mean(c['dense_kl'] for c in found):.4f}  {found[0]['minutes']:.1f} min"
        )
    print(json.dumps({"cells": cells, "settings": vars(arguments) | {"out": str(out)}}))


if __name__ == "__main__":
    main()
