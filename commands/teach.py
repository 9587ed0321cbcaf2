"""`deepdistill teach`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from ..distill.recipe.teach import Stage, TeachRecipe
from .declared import declared
from .shared import AsJson, Quiet, bars, console, resumable, tell

_GONE = {
    "--full": "write --weights full",
    "--qlora": "write --weights qlora",
    "--curate": "write --set curation.FILTER=VALUE; none or false switches a filter off",
    "--judge-compare": "the judge scores each answer by itself now: leave it out",
}


def run(
    recipe: TeachRecipe,
    out: Annotated[
        Path | None,
        typer.Option(
            help="The run folder. runs/STUDENT-PROBLEMS, unless given.",
            metavar="FOLDER",
            rich_help_panel="Problems and student",
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print the plan and what it may cost; ask nothing.", rich_help_panel="Cost"),
    ] = False,
    stop_after: Annotated[
        Stage | None, typer.Option(help="End early, after this stage.", rich_help_panel="Running")
    ] = None,
    json_output: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Train a student on a teacher's verified traces.

    Problems and a teacher become verified traces, a trained student, and scores before and after. Give the same
    command again to resume.
    """
    from ..distill.training.distributed import follow, is_first, leading

    if not is_first():
        follow()
        return
    from ..distill.evaluation.report import print_curation, print_hops
    from ..distill.run import run_name
    from ..distill.teach import teach as run_teach

    folder = out or Path("runs") / run_name(recipe.student, recipe.problems)
    if dry_run:
        _preview(recipe, folder, json_output=json_output, quiet=quiet)
        return
    with leading(), bars(quiet) as report, resumable(folder):
        result = run_teach(recipe, folder, report=report, stop_after=stop_after)
    if result.curation:
        print_curation(console(), result.curation)
        kept, total = result.curation["kept"], result.curation["traces"]
        own = folder / "traces.jsonl"
        tell(f"{kept} of {total} traces train; all of them are in {own if own.exists() else recipe.traces.file}")
    if result.scores:
        print_hops(console(), result.scores, {})
        tell(f"report: {folder}/report.html\nnext:   deepdistill quantize {folder}")
    if json_output:
        print(json.dumps(dataclasses.asdict(result), default=str))


def _preview(recipe: TeachRecipe, folder: Path, *, json_output: bool, quiet: bool) -> None:
    """Print what `teach` would ask for and what that may cost, without asking."""
    from ..distill.gather import as_told
    from ..distill.preview import describe_preview, preview
    from ..distill.run import settled
    from ..distill.teach import draw_problems

    recipe = as_told(settled(recipe, folder))
    with bars(quiet) as report:
        problems, held_out = draw_problems(recipe, report=report)
    made = preview(recipe, folder, problems=problems, held_out=held_out)
    tell(*describe_preview(made, problems, recipe))
    if json_output:
        print(json.dumps(dataclasses.asdict(made)))


TeachCommand, teach = declared(TeachRecipe, run, gone=_GONE)
