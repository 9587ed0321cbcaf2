"""`deepdistill runs`: the runs in a folder, two of them compared, one deleted."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UsageError
from .declared import Command, Group
from .shared import AsJson, console, tell

if TYPE_CHECKING:
    from rich.table import Table

    from ..distill.runs import RunComparison, RunSummary

runs = typer.Typer(cls=Group, invoke_without_command=True, rich_markup_mode=None)


@runs.callback()
def _list(
    context: typer.Context,
    in_folder: Annotated[Path, typer.Option("--in", help="The folder that the runs are in.", metavar="FOLDER")] = Path(
        "runs"
    ),
    json_output: AsJson = False,
) -> None:
    """List the runs, compare two of them, or delete one.

    Without a further command it lists them, the newest first: how far each came, and what its student learned.
    """
    if context.invoked_subcommand is not None:
        return
    from ..distill.runs import list_runs

    found = list_runs(in_folder)
    if found:
        console().print(_table(found))
    else:
        tell(f"no run in {in_folder}/ yet: deepdistill demo makes one")
    if json_output:
        print(json.dumps([dataclasses.asdict(run) for run in found], default=str))


@runs.command("compare", cls=Command)
def _compare(
    first: Annotated[Path, typer.Argument(help="A run folder.")],
    second: Annotated[Path, typer.Argument(help="Another run folder.")],
    json_output: AsJson = False,
) -> None:
    """Show which settings of two runs differ, and their scores side by side."""
    from ..distill.runs import compare_runs

    found = compare_runs(first, second)
    _print_comparison(found, first.name, second.name)
    if json_output:
        print(json.dumps(dataclasses.asdict(found), default=str))


@runs.command("delete", cls=Command)
def _delete(
    folder: Annotated[Path, typer.Argument(help="The run folder to delete.")],
    yes: Annotated[bool, typer.Option("--yes", help="Delete it without asking.")] = False,
    json_output: AsJson = False,
) -> None:
    """Delete a run folder with all that is in it, after asking.

    It refuses a folder that is not a run, that holds other files as well, or that a process is using.
    """
    from ..distill.runs import check_deletable, delete_run
    from ..localrun.core.printable import printable
    from ..localrun.core.text import format_bytes

    check_deletable(folder)
    sizes = [path.lstat().st_size for path in folder.rglob("*") if not path.is_dir()]
    what = f"{folder} ({len(sizes):,} files, {format_bytes(sum(sizes))})"
    if not yes:
        if not sys.stdin.isatty():
            raise UsageError(f"nobody can be asked whether to delete {folder}", "give --yes", code="not-confirmed")
        if not typer.confirm(printable(f"delete {what}?")):
            print("nothing is deleted")
            return
    delete_run(folder)
    tell(f"deleted {what}")
    if json_output:
        print(json.dumps({"deleted": str(folder), "bytes": sum(sizes)}))


def _table(found: list[RunSummary]) -> Table:
    """Return the list of runs, of which each cell may take several lines."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from ..localrun.core.text import format_bytes

    table = Table("run", "student", "problems", "stage", "accuracy", "size", "date", box=SIMPLE_HEAD, pad_edge=False)
    for column in table.columns:
        column.overflow, column.no_wrap = "fold", column.header in ("accuracy", "size", "date")
        column.justify = "right" if column.header in ("accuracy", "size") else "left"
    for run in found:
        problems = run.problems.partition("?")[0].removeprefix("gym:")
        stage = f"{run.stage}, at work" if run.is_at_work else run.stage
        before = _percent(run.base).removesuffix(" %")
        gain = _percent(run.base) if run.accuracy is None else f"{before} → {_percent(run.accuracy)}"
        table.add_row(run.folder.name, run.student, problems, stage, gain, format_bytes(run.n_bytes), run.changed[:10])
    return table


def _print_comparison(found: RunComparison, first: str, second: str) -> None:
    """Print the settings that differ, then the hops, then what the second student gained and lost."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    settings = Table("setting", first, second, box=SIMPLE_HEAD, pad_edge=False)
    for key, values in found.settings.items():
        settings.add_row(key, *("–" if value is None else str(value) for value in values))
    hops = Table("score", first, second, box=SIMPLE_HEAD, pad_edge=False)
    for hop, scores in found.hops.items():
        hops.add_row(hop, *map(_score, scores))
    for table in (settings, hops):
        for column in table.columns:
            column.overflow = "fold"
    terminal = console()
    terminal.print(settings if found.settings else "their settings are the same")
    if found.hops:
        terminal.print(hops)
    if n := sum(found.answers.values()):
        counts = ", ".join(f"{count} {state}" for state, count in found.answers.items())
        tell(f"{n} problems that both students answered, from {first} to {second}: {counts}")
    if not found.settings.keys().isdisjoint({"problems", "seed", "scores.n"}):
        print("note: they were scored on other problems, so their accuracies cannot be compared")


def _score(score: dict[str, Any] | None) -> str:
    if score is None:
        return "–"
    low, high = score["interval"]
    return f"{_percent(score['accuracy'])} ({100 * low:.1f}–{100 * high:.1f}) of {score['n']}" + (
        f", {score['n_unknown']} unknown" if score.get("n_unknown") else ""
    )


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"
