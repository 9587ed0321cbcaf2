"""From declared settings to a command: the flags that a person uses every day, `--set` and `--config` for all of them.

A command's settings come from its stage's `recipe.py`; this module alone knows typer. What is given is laid over the
declared defaults in one order: `--config FILE`, then `--set`, then flags.
"""

from __future__ import annotations

import inspect
import re
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from typer.core import TyperCommand, TyperGroup

from ..errors import UsageError
from ..localrun.core.settings import Leaf, build, fields_of, flat, put, read_assignment, read_toml

_METAVARS = {int: "N", float: "NUMBER", str: "TEXT"}
_TYPES = {"int": "N", "float": "NUMBER", "str": "TEXT", "path": "PATH"}
_TYPE = re.compile(rf" <({'|'.join(_TYPES)})(?: range)?>")  # as typer writes it
_RANGE = re.compile(r"(?:(; )|\s*\[)(?:[\d.]+<=?)?x[<>]=?[\d.]+\]$")  # also in errors, there in words
_RUNNING = "Running"

Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help="Read the settings from a TOML file; flags win over it.",
        rich_help_panel=_RUNNING,
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Set anything that `deepdistill recipe` lists, such as training.lora.rank=64. Repeatable.",
        rich_help_panel=_RUNNING,
    ),
]


def _write_options(command: Any, ctx: Any, formatter: Any) -> None:
    """Write each heading with its options in the order of their declaration; those of all commands come last."""
    sections: dict[str, list[tuple[str, str]]] = {}
    for param in command.get_params(ctx):
        if (record := param.get_help_record(ctx)) is None:
            continue
        name, text = record
        is_argument = param.param_type_name == "argument"
        default = "Arguments" if is_argument else _RUNNING if param.name == "help" else "Options"
        heading = getattr(param, "rich_help_panel", None) or default
        found = _TYPE.search(name)
        name = _TYPE.sub(f" {_TYPES[found[1]]}" if found and not is_argument else "", name)
        sections.setdefault(heading, []).append((name, _RANGE.sub(lambda match: "]" if match[1] else "", text)))
    for heading in sorted(sections, key=lambda heading: heading == _RUNNING):
        with formatter.section(heading):
            formatter.write_dl(sections[heading])


@contextmanager
def _readable_errors() -> Iterator[None]:
    """Clean what typer says of a wrong command line, which repeats it."""
    from ..localrun.core.printable import printable

    try:
        yield
    except Exception as error:
        if isinstance(said := getattr(error, "message", None), str):
            error.message = printable(said)  # type: ignore[attr-defined]
        raise


class Group(TyperGroup):
    """Commands whose help has them under headings, each with its first sentence in full."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the options before the command's name."""
        with _readable_errors():
            return super().parse_args(ctx, args)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command."""
        with _readable_errors():
            return super().resolve_command(ctx, args)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the commands, then the options."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for name in self.list_commands(ctx):
            command = self.get_command(ctx, name)
            if command is not None and not command.hidden:
                heading = getattr(command, "rich_help_panel", None) or "Commands"
                sections.setdefault(heading, []).append((name, (command.help or "").partition("\n\n")[0]))
        for heading, rows in sections.items():
            with formatter.section(heading):
                formatter.write_dl(rows)
        _write_options(self, ctx, formatter)


class Command(TyperCommand):
    """A command whose help has its options under headings, in the order of their declaration."""

    gone: dict[str, str] = {}  # noqa: RUF012 - set once, for each command's own class
    """What a flag that no longer exists is now: `--lora-rank` -> `--set training.lora.rank=…`."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the options under their headings."""
        _write_options(self, ctx, formatter)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the command line; a flag that is gone is refused with what took its place.

        Raises:
            UsageError: `code` "flag-gone".
        """
        for arg in args:
            if arg == "--":
                break
            if (now := self.gone.get(arg.partition("=")[0])) is not None:
                raise UsageError(f"there is no {arg.partition('=')[0]} any more", now, code="flag-gone")
        with _readable_errors():
            return super().parse_args(ctx, args)


def declared(
    cls: type, run: Callable[..., None], *, gone: dict[str, str] | None = None
) -> tuple[type[Command], Callable[..., None]]:
    """Return the class and the callback of a command whose settings are a tree of `cls`.

    `run` is called with the tree and, by keyword, its own further parameters, which are typer's: their annotations say
    what they are. `gone` maps flags that no longer exist to a hint; settings without a flag of their own are added.
    """
    leaves = [leaf for leaf in fields_of(cls) if leaf.flag.heading]
    own = list(inspect.signature(run, eval_str=True).parameters.values())[1:]
    before = [one for one in own if isinstance(get_args(one.annotation)[1], typer.models.ArgumentInfo)]
    after = [one for one in own if one not in before]
    shared = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        for name, annotation in (("config", Config), ("set_", Set))
    ]
    parameters = [
        one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in (*before, *map(_parameter, leaves), *after, *shared)
    ]

    def call(**given: Any) -> None:
        settings = settings_of(
            cls,
            config=given.pop("config"),
            assignments=given.pop("set_") or (),
            flags={leaf.path: given.pop("__".join(leaf.path)) for leaf in leaves},
        )
        run(settings, **given)

    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {one.name: one.annotation for one in parameters}
    call.__doc__ = run.__doc__ or cls.__doc__
    call.__name__ = run.__name__
    return type("Declared", (Command,), {"gone": _gone(cls) | (gone or {})}), call


def settings_of(
    cls: type, *, config: Path | None, assignments: Sequence[str], flags: dict[tuple[str, ...], Any]
) -> Any:
    """Return the settings that a file, `--set` and flags come to; a flag that is None was not given.

    Raises:
        UsageError: the file cannot be read, or some of it all is wrong; every fault is named.
    """
    values = dict[str, Any]() if config is None else _of_file(cls, config)
    given = {path: value for path, value in flags.items() if value is not None and value != []}
    for text in assignments:
        path, value = read_assignment(text)
        if path in given and given[path] != value:
            raise UsageError(f"--set {text} and its flag say two things", "give one of them", code="set-twice")
        put(values, path, value)
    for path, value in given.items():
        put(values, path, value)
    return build(cls, values)


def _of_file(cls: type, path: Path) -> dict[str, Any]:
    """Return the values of a file; what is wrong with them is said of the file. Flags may give what it leaves out."""
    values = read_toml(path)
    whole = tomllib.loads(path.read_text(encoding="utf-8"))
    for leaf in fields_of(cls):
        if leaf.default is MISSING and leaf.path not in dict(flat(values)):
            put(whole, leaf.path, "")
    build(cls, whole, where=str(path))
    return values


def _parameter(leaf: Leaf) -> inspect.Parameter:
    """Return a setting as a parameter of typer: None if it is not given, so that a file may say it.

    typer reads the type; bounds are checked where those of files are, so that both are refused alike.
    """
    name = f"--{leaf.flag_name}"
    declaration = f"{name}/--no-{leaf.flag_name}" if leaf.kind is bool else name
    option = typer.Option(
        declaration,
        help=leaf.flag.help + _default(leaf),
        metavar=leaf.flag.metavar or _METAVARS.get(leaf.kind),
        show_default=False,
        rich_help_panel=leaf.flag.heading,
    )
    kind = leaf.kind
    if leaf.flag.parse or get_origin(kind) is tuple:  # text that `build` reads, as it does a file's
        kind = list[Path] if kind == tuple[Path, ...] else str
    return inspect.Parameter(
        "__".join(leaf.path), inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def _default(leaf: Leaf) -> str:
    value = leaf.default
    if value is MISSING:
        return " [required]"
    if value is None or value is False or value == () or value == "":
        return ""
    return f" [default: {'on' if value is True else value}]"


def _gone(cls: type) -> dict[str, str]:
    """Return the flags of settings that have none of their own, with what to write; the first of a name has it."""
    offered = {leaf.flag_name for leaf in fields_of(cls) if leaf.flag.heading}
    hints = dict[str, str]()
    for leaf in fields_of(cls):
        if leaf.flag_name not in offered:
            value = "true" if leaf.kind is bool else _example(leaf)
            hints.setdefault(f"--{leaf.flag_name}", f"write --set {leaf.key}={value}")
    return hints


def _example(leaf: Leaf) -> str:
    if get_origin(leaf.kind) is Literal:
        return "|".join(map(str, get_args(leaf.kind)))
    return "VALUE" if leaf.default in (None, MISSING, ()) else f"{leaf.default}"
