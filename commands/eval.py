"""`deepdistill eval`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ..distill.recipe.gathering import AskingRecipe
from ..distill.recipe.teach import EvalRecipe
from .declared import declared
from .run_folder import run_of
from .shared import AsJson, Quiet, bars, tell


def run(
    recipe: EvalRecipe,
    model: Annotated[
        str,
        typer.Argument(help="pocket, smollm2, a run, a checkpoint folder, a .gguf, hf:ORG/NAME or https://HOST/v1."),
    ],
    json_output: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Score a model on held-out problems.

    It prints the accuracy with its 95 % interval, how many answers close their thinking or loop, and their tokens.
    """
    from ..distill.evaluation.evaluate import format_score, unclear
    from ..distill.evaluation.hops import score_model

    folder, taught = run_of(Path(model))
    if taught is not None and recipe.asking == AskingRecipe():
        recipe = replace(recipe, asking=taught.asking)
    with bars(quiet) as report:
        score = score_model(str(folder / "student") if folder else model, recipe, report=report)
    if score.n < recipe.n:
        tell(f"note: the test part of {recipe.problems} holds {score.n} problems, not {recipe.n}", stderr=True)
    closed = "" if score.closed is None else f", thinking closed {100 * score.closed:.1f} %"
    tell(
        f"{model}: {100 * score.accuracy:.1f} % of {score.n} (95 % interval {format_score(score.interval)} %), "
        f"unknown {100 * score.n_unknown / score.n:.1f} %{closed}, "
        f"looped {100 * score.looped:.1f} %, {score.tokens_per_answer:.0f} tokens per answer, "
        f"{score.tokens_per_s:.0f} tokens/s"
    )
    if text := unclear(vars(score)):
        tell(f"note: {text}")
    if json_output:
        print(json.dumps({"model": model, "problems": recipe.problems, "seed": recipe.seed} | vars(score)))


EvalCommand, eval_ = declared(EvalRecipe, run)
