"""The command line: its commands in the order of `--help`, and how every one of them ends."""

from __future__ import annotations

import errno
import sys
from typing import Annotated

import typer

from . import __version__
from .commands.bench import bench
from .commands.chat import chat
from .commands.demo import demo
from .commands.doctor import doctor
from .commands.eval import eval_
from .commands.export import export
from .commands.inspect import inspect
from .commands.plan import plan
from .commands.quantize import quantize
from .commands.teach import teach
from .errors import DeepDistillError

app = typer.Typer(
    name="deepdistill",
    help="Put a large teacher's reasoning into a small model that runs on a laptop, and measure every hop.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for _command in (demo, teach, plan, quantize, chat, bench, doctor, export, inspect):
    app.command()(_command)
app.command("eval")(eval_)


def main(argv: list[str] | None = None) -> int:
    """Run a command line and return its exit code: 0 done, 1 error, 2 usage, 3 a gate was not met, 130 Ctrl-C."""
    try:
        app(args=argv)
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else 1
    except DeepDistillError as error:
        print(f"error: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        print(f"error: {error}\nhint: what was written before stays; make room and run again", file=sys.stderr)
        return 1
    return 0


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
