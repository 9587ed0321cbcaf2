"""The flags that mean the same in every command, and how all of them report."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from ..localrun.core.bars import Bars

Out = Annotated[Path | None, typer.Option(help="The folder or file to write.")]
Seed = Annotated[int, typer.Option(help="Seed of the choice of problems, the sampling and the training.", min=0)]
AsJson = Annotated[
    bool,
    typer.Option(
        "--json", help="Print one JSON object as the last line of standard output.", rich_help_panel="Running"
    ),
]
Offline = Annotated[bool, typer.Option("--offline", help="Never touch the network.", rich_help_panel="Running")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print no progress on standard error.", rich_help_panel="Running")]


def bars(quiet: bool) -> Bars:
    """Return the progress bars of a command."""
    from ..localrun.core.bars import Bars

    return Bars(quiet)


def console() -> Console:
    """Return the terminal that results go to."""
    from ..localrun.core.printable import new_console

    return new_console()


def tell(*lines: object, stderr: bool = False) -> None:
    """Print lines that may hold foreign text, a file's name or a server's words, of which a terminal obeys nothing."""
    from ..localrun.core.printable import printable

    print(*(printable(str(line)) for line in lines), sep="\n", file=sys.stderr if stderr else sys.stdout)


@contextmanager
def resumable(folder: Path) -> Iterator[None]:
    """On Ctrl-C, say that nothing is lost and how to resume."""
    try:
        yield
    except KeyboardInterrupt:
        tell(f"\nstopped; {folder} keeps what was done: the same command resumes there", stderr=True)
        raise
