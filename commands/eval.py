"""`deepdistill eval`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from .runs import run_of
from .shared import (
    DEMO_PROBLEMS,
    AsJson,
    BatchSize,
    Concurrency,
    Device,
    Offline,
    Problems,
    Quiet,
    Seed,
    ServerModel,
    bars,
)


def eval_(
    model: Annotated[
        str,
        typer.Argument(help="pocket, smollm2, a run, a checkpoint folder, a .gguf, hf:ORG/NAME or https://HOST/v1."),
    ],
    problems: Problems = DEMO_PROBLEMS,
    n: Annotated[int, typer.Option("--n", help="Held-out problems.", min=1)] = 200,
    seed: Seed = 0,
    max_tokens: Annotated[int, typer.Option(help="An answer's limit, thinking included.", min=1)] = 512,
    temperature: Annotated[float, typer.Option(min=0)] = 0.0,
    answers: Annotated[
        Path | None, typer.Option(help="Write every question, answer and verdict to this JSONL file.")
    ] = None,
    server_model: ServerModel = None,
    concurrency: Concurrency = None,
    batch_size: BatchSize = None,
    device: Device = "auto",
    json_output: AsJson = False,
    offline: Offline = False,
    quiet: Quiet = False,
) -> None:
    """Accuracy with its interval, closed thinking, loops and tokens an answer, on held-out problems."""
    from ..distill.evaluation.evaluate import evaluate, format_score
    from ..distill.graders.pool import Grader
    from ..distill.problems.load import load_problems
    from ..distill.teachers import open_teacher
    from ..distill.training.student import student_dir
    from ..localrun.core.generation import Sampling

    held_out = load_problems(problems, "test", n=n, seed=seed, offline=offline)
    spec = str(student_dir(model)) if model == "smollm2" else model
    folder, _ = run_of(Path(model))
    with (
        bars(quiet) as progress,
        open_teacher(
            str(folder / "student") if folder else spec,
            device=device,
            batch_size=batch_size,
            concurrency=concurrency,
            model=server_model,
            offline=offline,
        ) as teacher,
        Grader() as grader,
    ):
        for source in {p.source for p in held_out}:
            teacher.accepts(source)
        score = evaluate(
            teacher,
            held_out,
            grader=grader,
            sampling=Sampling(temperature=temperature, seed=seed, max_tokens=max_tokens),
            answers_path=answers,
            report=progress,
        )
    if score.n < n:
        print(f"note: the test part of {problems} holds {score.n} problems, not {n}", file=sys.stderr)
    closed = "" if score.closed is None else f", thinking closed {100 * score.closed:.1f} %"
    print(
        f"{model}: {100 * score.accuracy:.1f} % of {score.n} (95 % interval {format_score(score.interval)} %){closed}, "
        f"looped {100 * score.looped:.1f} %, {score.tokens_per_answer:.0f} tokens an answer, "
        f"{score.tokens_per_s:.0f} tokens/s"
    )
    if json_output:
        print(json.dumps({"model": model, "problems": problems, "seed": seed} | score.to_json()))
