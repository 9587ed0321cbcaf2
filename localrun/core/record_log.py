"""JSON Lines files of records: a frozen dataclass a line, written whole and checked field by field when it is read.

A process that dies while it writes leaves at most a last line without its newline: readers leave it out, and the next
writer cuts it off. A broken line anywhere else is no accident of ours: it is named, and nothing is overwritten.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import types
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from ...errors import ArtifactError
from .append_file import AppendFile

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

R = TypeVar("R", bound="DataclassInstance")
_Read = Callable[[Any], Any]
_ENCODER = json.JSONEncoder(ensure_ascii=False, default=vars)  # vars: dataclasses within, without a deep copy
_BATCH = 1000  # records that one write appends, at most


def to_json(record: DataclassInstance) -> str:
    """Return a record as one line of JSON, without its newline."""
    return _ENCODER.encode(vars(record))


def from_json(cls: type[R], line: str | bytes) -> R:
    """Return the record that a line holds. Fields that `cls` does not have are left out: a newer version wrote them.

    Raises:
        ValueError: the line is not JSON, lacks a field, or has a value of another type than the field's.
    """
    try:
        values = json.loads(line)
    except RecursionError as error:
        raise ValueError("its JSON is nested too deeply") from error
    return _read_record(cls, values)


def read_records(path: Path, cls: type[R], *, missing_ok: bool = False, skip_broken: bool = False) -> Iterator[R]:
    """Yield the records of a file one at a time, leaving out a torn last line.

    Raises:
        ArtifactError: `code` "file-unreadable": there is no such file (unless `missing_ok`) or it cannot be read;
            "line-broken": a line holds no such record (unless `skip_broken`).
    """
    if missing_ok and not path.exists():
        return
    for number, line in whole_lines(path):
        try:
            yield parse_line(cls, line, path=path, number=number)
        except ArtifactError:
            if not skip_broken:
                raise


def whole_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (number from 1, line with its newline) of each whole line, leaving out a torn last one.

    Raises:
        ArtifactError: `code` "file-unreadable".
    """
    try:
        with path.open("rb", buffering=1 << 20) as lines:
            for number, line in enumerate(lines, 1):
                if not line.endswith(b"\n"):
                    return
                yield number, line
    except OSError as error:
        raise ArtifactError(
            f"cannot read {path}: {error.strerror or error}", "check the path", code="file-unreadable"
        ) from error


def parse_line(cls: type[R], line: bytes, *, path: Path, number: int) -> R:
    """Return the record that a line of a file holds.

    Raises:
        ArtifactError: `code` "line-broken"; the message names the file, the line and what is wrong with it.
    """
    try:
        return from_json(cls, line)
    except ValueError as error:
        raise ArtifactError(
            f"{path}:{number} is broken: {error}",
            "if this is the right file, mend or delete that line: nothing was changed",
            code="line-broken",
        ) from error


class RecordLog(AppendFile, Generic[R]):
    """A JSON Lines file that only grows. A record that `append` returned from survives `kill -9`.

    Opening cuts off a torn last line; `n_cut_bytes` says how long it was. Close the log, or use it in a `with` block.
    It does not keep other writers out: take a `WriterLock` for that.
    """

    def __init__(self, path: Path, cls: type[R]) -> None:
        """Open or create the file.

        Raises:
            ArtifactError: `code` "write-failed".
        """
        super().__init__(path)
        self._cls = cls
        self.n_cut_bytes = self.cut_torn_line()

    def append(self, record: R) -> None:
        """Add a record; if that fails, nothing of it is in the file; see `write`."""
        self.write(_line(record))

    def extend(self, records: Iterable[R]) -> None:
        """Add many records with few writes; see `write`."""
        rest = iter(records)
        while batch := b"".join(map(_line, itertools.islice(rest, _BATCH))):
            self.write(batch)

    def __iter__(self) -> Iterator[R]:
        """Yield what the file holds so far, in order."""
        return read_records(self.path, self._cls)


def _line(record: DataclassInstance) -> bytes:
    try:
        return (to_json(record) + "\n").encode()
    except UnicodeEncodeError:  # half a surrogate pair, as a server may send it: only an escape can say that
        return (json.dumps(vars(record), default=vars) + "\n").encode()


@functools.cache
def _fields(cls: type[Any]) -> list[tuple[str, frozenset[type], _Read, bool]]:
    """Return of each field its name, the types that pass as they are, a reader for others, and if it is required."""
    hints, missing = get_type_hints(cls), dataclasses.MISSING
    return [
        (
            field.name,
            _plain_types(hints[field.name]),
            _reader(hints[field.name]),
            field.default is missing and field.default_factory is missing,
        )
        for field in dataclasses.fields(cls)
    ]


def _read_record(cls: type[R], values: Any) -> R:
    if type(values) is not dict:
        raise ValueError("not a JSON object")
    found = {}
    for name, plain_types, read, is_required in _fields(cls):
        try:
            value = values[name]
        except KeyError:
            if is_required:
                raise ValueError(f"not a {cls.__name__.lower()}: it has no {name}") from None
            continue
        if type(value) not in plain_types:
            try:
                value = read(value)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        found[name] = value
    return cls(**found)


def _plain_types(hint: Any) -> frozenset[type]:
    """Return the types of JSON that a value of this hint may have, if its type alone decides; else nothing."""
    if _is_union(hint):
        options = [_plain_types(option) for option in get_args(hint)]
        return frozenset().union(*options) if all(options) else frozenset()
    if hint is float:
        return frozenset((float, int))  # JSON writes 1.0 as 1, and so does Python for an int
    return frozenset((hint,)) if hint in (str, int, bool, type(None)) else frozenset()


def _reader(hint: Any) -> _Read:
    """Return what checks a value against a hint, builds the dataclasses within, and raises ValueError."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return lambda value: value
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return functools.partial(_read_record, hint)
    if _is_union(hint):
        return functools.partial(_read_union, [_reader(option) for option in arguments])
    if origin is Literal:
        return functools.partial(_read_choice, arguments)
    if origin in (list, tuple):
        return functools.partial(_read_list, origin, _reader(arguments[0]))
    if origin is dict:
        return functools.partial(_read_dict, _reader(arguments[1]))
    return functools.partial(_read_plain, _plain_types(hint) or frozenset((hint,)))


def _is_union(hint: Any) -> bool:
    return get_origin(hint) in (Union, types.UnionType)


def _read_plain(allowed: frozenset[type], value: Any) -> Any:
    if type(value) not in allowed:  # not isinstance: true is not a count
        raise ValueError(f"{_shown(value)} is not {' or '.join(sorted(kind.__name__ for kind in allowed))}")
    return value


def _read_choice(choices: tuple[Any, ...], value: Any) -> Any:
    if value not in choices:
        raise ValueError(f"{_shown(value)} is not one of {', '.join(map(str, choices))}")
    return value


def _read_union(options: list[_Read], value: Any) -> Any:
    for option in options[:-1]:
        try:
            return option(value)
        except ValueError:
            continue
    return options[-1](value)


def _read_list(kind: type, read: _Read, value: Any) -> Any:
    if type(value) is not list:
        raise ValueError(f"{_shown(value)} is not a list")
    return kind(map(read, value))


def _read_dict(read: _Read, value: Any) -> Any:
    if type(value) is not dict:
        raise ValueError(f"{_shown(value)} is not an object")
    return {name: read(each) for name, each in value.items()}


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
