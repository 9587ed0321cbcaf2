"""The command line: its commands in the order of `--help`, and how every one of them ends."""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from . import __version__
from .commands.bench import bench
from .commands.chat import ChatCommand, chat
from .commands.declared import Command, Group
from .commands.demo import demo
from .commands.doctor import doctor
from .commands.eval import EvalCommand, eval_
from .commands.export import export
from .commands.inspect import inspect
from .commands.plan import plan
from .commands.quantize import QuantizeCommand, quantize
from .commands.recipe import recipe
from .commands.runs import runs
from .commands.shared import tell
from .commands.teach import TeachCommand, teach
from .errors import DeepDistillError

app = typer.Typer(
    name="deepdistill",
    cls=Group,
    help="Put a large teacher's reasoning into a small model that runs on a laptop, and measure every hop.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
_COMMANDS: dict[str, tuple[tuple[str, type[Command], Callable[..., None]], ...]] = {
    "From a teacher to your laptop": (
        ("demo", Command, demo),
        ("teach", TeachCommand, teach),
        ("quantize", QuantizeCommand, quantize),
        ("chat", ChatCommand, chat),
        ("eval", EvalCommand, eval_),
    ),
    "What was made": (
        ("inspect", Command, inspect),
        ("export", Command, export),
    ),
    "Before you begin": (
        ("recipe", Command, recipe),
        ("plan", Command, plan),
        ("doctor", Command, doctor),
        ("bench", Command, bench),
    ),
}
for _heading, _commands in _COMMANDS.items():
    for _name, _class, _command in _commands:
        app.command(_name, cls=_class, rich_help_panel=_heading)(_command)
app.add_typer(runs, name="runs", rich_help_panel="What was made")


def main(argv: list[str] | None = None) -> int:
    """Run a command line and return its exit code: 0 done, 1 error, 2 usage, 3 a gate was not met, 130 Ctrl-C."""
    try:
        app(args=argv)
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else 1
    except DeepDistillError as error:
        _print_error(error, as_json="--json" in (sys.argv if argv is None else argv))
        return error.exit_code
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        tell(f"error: {error}\nhint: what was written before stays; make room and run again", stderr=True)
        return 1
    return 0


def _print_error(error: DeepDistillError, *, as_json: bool) -> None:
    """Print an error and its hint; a program that reads JSON gets the code as well."""
    tell(f"error: {error.message}", *([f"hint: {error.hint}"] if error.hint else []), stderr=True)
    if as_json:
        record = {"code": error.code, "message": error.message, "hint": error.hint}
        print(json.dumps({"error": record}))


def _show_version(value: bool) -> None:
    if value:
        print(f"deepdistill {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Take what every command shares."""


if __name__ == "__main__":
    sys.exit(main())
