"""The flags that mean the same in every command, and what is said in the same way."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from ..localrun.core.reporter import Bars

DEMO_PROBLEMS = "gym:chain_sum?min_terms=2&max_terms=4&min_digits=1&max_digits=2"

Problems = Annotated[
    str,
    typer.Option(
        help="gym:NAME?param=value&…, a .jsonl, .csv, .parquet or .txt file, a folder of prompts, or "
        "hf:ORG/NAME?split=…; ?grader=KIND:ARGUMENT says how to grade."
    ),
]
Out = Annotated[Path | None, typer.Option(help="Where to write.")]
Seed = Annotated[int, typer.Option(help="Of the problems, the sampling and the training.", min=0)]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object as the last line of standard output.")]
Offline = Annotated[bool, typer.Option("--offline", help="Never touch the network.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress on standard error.")]
Concurrency = Annotated[
    int | None, typer.Option(help="Requests in flight to an endpoint; it finds the best number if not given.", min=1)
]
BatchSize = Annotated[int | None, typer.Option(help="Sequences that a model in process answers at once.", min=1)]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1, for a model that answers in this process.")]
ServerModel = Annotated[str | None, typer.Option("--model", help="The model's name on the server, if it has several.")]


def bars(quiet: bool) -> Bars:
    """Return the progress bars of a command."""
    from ..localrun.core.reporter import Bars

    return Bars(quiet)


def console() -> Console:
    """Return the terminal that results go to."""
    from rich.console import Console

    return Console()


def note(text: str) -> None:
    """Say on standard error what is no error."""
    print(f"note: {text}", file=sys.stderr)


@contextmanager
def resumable(folder: Path) -> Iterator[None]:
    """On Ctrl-C, say that nothing is lost and how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"\nstopped; {folder} keeps what was done: the same command goes on from there", file=sys.stderr)
        raise
