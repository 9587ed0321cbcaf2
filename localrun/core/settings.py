"""Settings, declared once: a tree of frozen dataclasses from which flags, files, checks and reference pages come.

A field is `rank: int = setting(32, "What it does.", min=1)`; a field whose type is a dataclass is a section. Values
come as Python and TOML have them, or as the text of a flag, and are checked alike wherever they come from. The text
"none" clears a setting that may be empty, as TOML has no word for that.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import tomllib
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from ...errors import UsageError

_S = TypeVar("_S")
_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"}


@dataclass(frozen=True)
class Flag:
    """What a setting is to a person: its help, its bounds, and its flag where it has one.

    A setting with a `heading` is a flag of its command, listed under it; the others are reached by `--set PATH=VALUE`
    and by files. `name` is the flag's, where it is not the field's. `parse` reads text that stands for a value of
    another type. A `fixed` setting cannot change once a run holds work; `unused_by` names the methods that ignore it.
    """

    help: str
    min: float | None = None
    max: float | None = None
    name: str = ""
    heading: str = ""
    metavar: str = ""
    parse: Callable[[str], Any] | None = None
    fixed: bool = False
    unused_by: tuple[str, ...] = ()


def setting(default: _S, help: str, **flag: Any) -> _S:
    """Return the field of a setting; the other keywords are those of `Flag`."""
    return dataclasses.field(default=default, metadata={"flag": Flag(help, **flag)})


def required(help: str, **flag: Any) -> Any:
    """Return the field of a setting without a default."""
    return setting(MISSING, help, **flag)


class Leaf(NamedTuple):
    """One setting of a tree: where it is, what it takes and what it is if nobody says."""

    path: tuple[str, ...]
    type: Any
    flag: Flag
    default: Any  # MISSING: it has to be given

    @property
    def key(self) -> str:
        """The path with dots: `training.lora.rank`."""
        return ".".join(self.path)

    @property
    def flag_name(self) -> str:
        """The flag without its dashes, whether it is offered or not."""
        return self.flag.name or self.path[-1].replace("_", "-")

    @property
    def kind(self) -> Any:
        """The type of a value that is there: without `None`."""
        return _without_none(self.type)

    @property
    def is_optional(self) -> bool:
        """Whether it may be empty."""
        return self.kind is not self.type


@cache
def fields_of(cls: type) -> tuple[Leaf, ...]:
    """Return every setting of a tree, in its order."""
    return tuple(_leaves(cls, ()))


def build(cls: type[_S], values: Mapping[str, Any], where: str = "") -> _S:
    """Make the tree from nested plain values; what they leave out is what the declaration says.

    Raises:
        UsageError: `code` "bad-settings": unknown keys, wrong types and values out of bounds, all of them at once; or
            what a section itself says of values that do not go together.
    """
    faults = list[str]()
    made = _built(cls, values, path=(), faults=faults)
    if faults:
        named = "; ".join(faults)
        hint = "`deepdistill recipe` prints every setting with its default"
        raise UsageError(f"{where}: {named}" if where else named, hint, code="bad-settings")
    return made  # type: ignore[no-any-return]


def values_of(settings: Any) -> dict[str, Any]:
    """Return a tree as nested plain values that JSON and TOML have, from which `build` makes it again."""
    return {field.name: _plain(getattr(settings, field.name)) for field in dataclasses.fields(settings) if field.init}


def check(settings: _S) -> _S:
    """Return a tree that Python code made, once its values are known to be what `build` would take.

    Raises:
        UsageError: see `build`.
    """
    return build(type(settings), values_of(settings))


def get(settings: Any, path: Sequence[str]) -> Any:
    """Return the value of a setting."""
    for part in path:
        settings = getattr(settings, part)
    return settings


def changed(settings: _S, values: Mapping[str, Any]) -> _S:
    """Return a tree in which settings have other values: `changed(recipe, {"training.lora.rank": 8})`."""
    for key, value in values.items():
        settings = _changed(settings, key.split("."), value)
    return settings


def put(values: dict[str, Any], path: Sequence[str], value: Any) -> None:
    """Set a value in nested plain values, making the sections on the way."""
    *sections, name = path
    for section in sections:
        values = values.setdefault(section, {})
    values[name] = value


def flat(values: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield the path and the value of every setting in nested plain values."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, (*prefix, name))
        else:
            yield (*prefix, name), value


def read_assignment(text: str) -> tuple[tuple[str, ...], Any]:
    """Return the path and the value of `training.lora.rank=64`; a value that TOML cannot read is text.

    Raises:
        UsageError: there is no `=` in it.
    """
    path, equals, value = text.partition("=")
    if not equals or not path.strip():
        raise UsageError(f"--set {text} has no value", "write --set training.lora.rank=64", code="bad-assignment")
    try:
        read = tomllib.loads(f"value = {value}")["value"]
    except (tomllib.TOMLDecodeError, RecursionError):
        read = value
    return tuple(part.strip().replace("-", "_") for part in path.split(".")), read


def read_toml(path: Path) -> dict[str, Any]:
    """Return the nested values of a TOML file.

    Raises:
        UsageError: it cannot be read, or is no TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}", code="config-unreadable") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        hint = "`deepdistill recipe` prints a file to begin with"
        raise UsageError(f"{path} is not TOML: {error}", hint, code="config-broken") from error


def as_toml(settings: Any) -> str:
    """Return a TOML file with every setting and a comment on each; settings that are empty are commented out.

    A dataclass stands for a tree whose required settings are not there yet.
    """
    cls = settings if isinstance(settings, type) else type(settings)
    lines = list[str]()
    section: tuple[str, ...] = ()
    top_first = sorted(fields_of(cls), key=lambda leaf: len(leaf.path) > 1)  # TOML wants plain keys before tables
    for leaf in top_first:
        value = leaf.default if settings is cls else get(settings, leaf.path)
        if leaf.path[:-1] != section:
            section = leaf.path[:-1]
            lines += ["", f"[{'.'.join(section)}]"]
        lines.append(f"# {leaf.flag.help}{_range(leaf)}")
        lines.append(_assignment(leaf, value))
    return "\n".join(lines).strip() + "\n"


def describe_type(leaf: Leaf) -> str:
    """Return what a setting takes, in words: `a whole number`, `lora, full or qlora`."""
    return leaf.flag.metavar or _described(leaf.kind)


def _changed(settings: Any, path: Sequence[str], value: Any) -> Any:
    name, *rest = path
    inner = _changed(getattr(settings, name), rest, value) if rest else value
    return dataclasses.replace(settings, **{name: inner})


def plain_default(leaf: Leaf) -> str:
    """Return a setting's default for a table: in backquotes, `required` or empty."""
    if leaf.default is MISSING:
        return "required"
    if leaf.default is None or leaf.default == ():
        return ""
    if isinstance(leaf.default, str) and "\n" in leaf.default:
        return "a text of its own"
    return f"`{_toml(_plain(leaf.default))}`"


def _built(cls: type, values: Any, *, path: tuple[str, ...], faults: list[str]) -> Any:
    """Make one section, or note what is wrong with it and return None."""
    name = ".".join(path)
    if not isinstance(values, Mapping):
        faults.append(f"{name} is {json.dumps(values, default=str)}, not a section")
        return None
    n_before, made = len(faults), dict[str, Any]()
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1) or _elsewhere(cls, str(key))
            full = ".".join((*path, str(key)))
            faults.append(f"{full} is no setting" + (f"; did you mean {'.'.join((*path, near[0]))}?" if near else ""))
    sections = {leaf.path[0] for leaf in fields_of(cls) if len(leaf.path) > 1}
    leaves = {leaf.path[0]: leaf for leaf in fields_of(cls) if len(leaf.path) == 1}
    for key in fields:
        if key in sections:
            hint = get_type_hints(cls)[key]
            made[key] = _built(hint, values.get(key, {}), path=(*path, key), faults=faults)
        elif key in values:
            try:
                made[key] = _checked(leaves[key], values[key])
            except (ValueError, UsageError) as error:
                faults.append(f"{_named(leaves[key], path)} {error}")
        elif leaves[key].default is MISSING:
            faults.append(f"{_named(leaves[key], path)} is missing")
    return cls(**made) if len(faults) == n_before else None


def _named(leaf: Leaf, path: tuple[str, ...]) -> str:
    """Return a setting's key, and its flag where it has one."""
    key = ".".join((*path, *leaf.path))
    return f"{key} (--{leaf.flag_name})" if leaf.flag.heading else key


def _elsewhere(cls: type, key: str) -> list[str]:
    """Return the path, within a section, of a setting of that name that lies deeper."""
    return [leaf.key for leaf in fields_of(cls) if leaf.path[-1] == key][:1]


def _checked(leaf: Leaf, value: Any) -> Any:
    """Return a value as the setting's type.

    Raises:
        ValueError: it is not of that type or out of bounds; the text goes on after the setting's name.
    """
    if leaf.is_optional and (value is None or value == "none"):
        return None
    if isinstance(value, str) and leaf.flag.parse:
        value = leaf.flag.parse(value)
    read = _read(leaf.kind, value)
    if read is MISSING:
        raise ValueError(f"is {json.dumps(value, default=str)}, not {describe_type(leaf)}")
    for number in read if isinstance(read, tuple) else (read,):
        if isinstance(number, bool) or not isinstance(number, int | float):
            continue
        low, high = leaf.flag.min, leaf.flag.max
        if (low is not None and number < low) or (high is not None and number > high):
            raise ValueError(f"is {number}, not {_between(low, high)}")
    return read


def _read(kind: Any, value: Any) -> Any:
    """Return a value as a type, MISSING if it is not one of its values."""
    if get_origin(kind) is Literal:
        return value if any(value == choice and type(value) is type(choice) for choice in get_args(kind)) else MISSING
    if get_origin(kind) is tuple:
        return _read_many(get_args(kind), value)
    if kind is Path and isinstance(value, str | Path):
        return Path(value)
    if kind is float and type(value) in (int, float):
        return float(value) if math.isfinite(value) else MISSING
    return value if type(value) is kind else MISSING


def _read_many(kinds: tuple[Any, ...], value: Any) -> Any:
    """Return a list, or text with commas, as a tuple of `(kind, ...)` or of one kind each."""
    if isinstance(value, str):
        items: list[Any] = [_number(part.strip()) for part in value.split(",") if part.strip()]
    elif isinstance(value, list | tuple):
        items = list(value)
    else:
        items = [value]
    each = [kinds[0]] * len(items) if kinds[-1] is Ellipsis else list(kinds)
    if len(items) != len(each):
        return MISSING
    read = [
        _read(kind, str(item) if kind is str and type(item) in (int, float) else item)
        for kind, item in zip(each, items, strict=True)
    ]
    return MISSING if MISSING in read else tuple(read)


def _number(text: str) -> Any:
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text


def _leaves(cls: type, prefix: tuple[str, ...]) -> Iterator[Leaf]:
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        hint, path = hints[field.name], (*prefix, field.name)
        if dataclasses.is_dataclass(hint):
            yield from _leaves(hint, path)  # type: ignore[arg-type]
        else:
            assert "flag" in field.metadata, f"{cls.__name__}.{field.name} says nothing of itself"
            yield Leaf(path, hint, field.metadata["flag"], field.default)


def _without_none(hint: Any) -> Any:
    if get_origin(hint) not in (types.UnionType, Union) or type(None) not in get_args(hint):
        return hint
    kinds = [kind for kind in get_args(hint) if kind is not type(None)]
    assert len(kinds) == 1, f"a setting has one type, and may be empty: {hint}"
    return kinds[0]


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return values_of(value)
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _described(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " or ".join(", ".join(map(str, get_args(kind))).rsplit(", ", 1))
    if get_origin(kind) is tuple:
        kinds = get_args(kind)
        if kinds[-1] is Ellipsis:
            inner = get_args(kinds[0]) if get_origin(kinds[0]) is Literal else ()
            return f"a list of {', '.join(inner)}" if inner else "a list"
        return ",".join(["NUMBER"] * len(kinds))
    return _KINDS[kind]


def _between(low: float | None, high: float | None) -> str:
    if low is None:
        return f"{high:g} or less"
    return f"{low:g} or more" if high is None else f"between {low:g} and {high:g}"


def _range(leaf: Leaf) -> str:
    """Return what follows a setting's help in a file: its choices or bounds."""
    if get_origin(leaf.kind) is Literal:
        return f" [{' | '.join(map(str, get_args(leaf.kind)))}]"
    low, high = leaf.flag.min, leaf.flag.max
    return "" if low is None and high is None else f" [{_between(low, high)}]"


def _assignment(leaf: Leaf, value: Any) -> str:
    name = leaf.path[-1]
    if value is MISSING:
        return f"# {name} = "
    if value is None:
        return f"# {name} = " if leaf.default is None else f'{name} = "none"'
    return f"{name} = {_toml(_plain(value))}"


def _toml(value: Any) -> str:
    """Return a plain value as TOML writes it: as JSON does, but for one control character."""
    if isinstance(value, str) and "\n" in value and value.replace("\n", "").isprintable() and '"""' not in value:
        body = value.replace("\\", "\\\\").replace("\x7f", "\\u007f")
        return f'"""\n{body}"""' if not value.endswith('"') else json.dumps(value)
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
