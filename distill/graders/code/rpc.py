"""Calls between the tests and the code they test, each in its own process: only plain values cross.

A value that crosses is rebuilt from JSON in the tests' process, so its `==`, length and truth value are Python's and
not the code's. JSON keeps it without loss: a tuple is not a list, 1 is not 1.0, and integers keep all their digits. Any
other object stays in the code's process and crosses as a handle. A handle can be called and asked for attributes, items
and its length, but comparisons and arithmetic are refused: with them the code would judge itself.
"""

from __future__ import annotations

import builtins
import inspect
import json
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any, BinaryIO, NoReturn

_MAX_MESSAGE = 16 << 20
# Special methods, without their underscores.
_FORWARDED = "call len iter next getitem setitem delitem bool int float str repr enter exit instancecheck"
_REFUSED = (
    "ne lt le gt ge contains add radd sub rsub mul rmul truediv rtruediv floordiv rfloordiv mod rmod pow rpow matmul "
    "and rand or ror xor rxor neg abs round index mro_entries await aiter"
)


class Undecided(BaseException):
    """The verdict is unknown: the tests need something that cannot cross, or would let the code judge itself."""


class Gone(BaseException):
    """The code's process failed to start, has ended, or sends malformed replies."""


class ForeignError(Exception):
    """An exception of a class that only the code's process has."""


class Caller:
    """The tests' side: sends calls to the code's process, and answers when the code calls a function it was given.

    `undecided` and `gone` keep the reason why it stopped, since a test may catch every exception.
    """

    def __init__(self, read: BinaryIO, write: BinaryIO) -> None:
        self._read, self._write = read, write
        self._callbacks: list[Callable[..., Any]] = []
        self.n_calls = 0
        self.met_foreign_error = False
        self.undecided: str | None = None
        self.gone: str | None = None

    def refuse(self, reason: str) -> NoReturn:
        """Give up on a verdict."""
        self.undecided = reason
        raise Undecided(reason)

    def _end(self, reason: str) -> NoReturn:
        self.gone = reason
        raise Gone(reason)

    def name(self, name: str) -> Any:
        """Return the code's object of this name.

        Raises:
            NameError: the code defines no such name.
        """
        return self._ask({"do": "name", "name": name}, (), {})

    def ask(self, handle: int, method: str, *, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a method of the object behind a handle."""
        self.n_calls += method == "__call__"
        return self._ask({"do": "method", "on": handle, "name": method}, args, kwargs)

    def _ask(self, message: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = [list(args), kwargs]
        try:
            self._send(message | {"given": encode(given, self._export)})
        except RecursionError:
            self.refuse("an argument is too deep or holds itself")
        while True:
            reply = self._receive()
            try:
                if "callback" in reply:
                    self._send(self._call_back(reply))
                    continue
                if "given" in reply:
                    refill(given, decode(reply["given"], self._resolve))
                if "failed" in reply:
                    self._end(str(reply["failed"]))
                if "error" in reply:
                    raise self._error(*reply["error"], is_next=message.get("name") == "__next__")
                return decode(reply["value"], self._resolve)
            except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError):
                if "error" in reply:
                    raise
                self._end("the code's process sends malformed replies")

    def _call_back(self, reply: dict[str, Any]) -> dict[str, Any]:
        args, kwargs = decode(reply["given"], self._resolve)
        function = self._callbacks[reply["callback"]]
        try:
            return {"value": encode(function(*args, **kwargs), self._export)}
        except Exception as error:
            return {"error": [type(error).__name__, str(error)]}

    def _error(self, name: str, text: str, *, is_next: bool) -> Exception:
        if name == "StopIteration" and not is_next:  # it would end a test's loop over calls, which then checks nothing
            return RuntimeError(f"the code raised StopIteration: {text}")
        kind = getattr(builtins, str(name), None)
        if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, UnicodeError):
            return kind(str(text))
        self.met_foreign_error = True
        return ForeignError(f"{name}: {text}")

    def _export(self, value: Any) -> dict[str, Any]:
        if isinstance(value, Remote):
            return {"own": value._handle}
        name = getattr(value, "__name__", None)
        if inspect.isclass(value) and vars(builtins).get(str(name)) is value:
            return {"builtin": name}
        if inspect.isroutine(value):
            self._callbacks.append(value)
            return {"callback": len(self._callbacks) - 1}
        self.refuse(f"the tests give the code a {type(value).__name__}, which cannot cross")

    def _resolve(self, value: dict[str, Any]) -> Any:
        if value["kind"] in ("coroutine", "async_generator"):
            self.refuse("the code is asynchronous")
        return Remote(self, int(value["handle"]), bool(value["compares"]))

    def _send(self, message: dict[str, Any]) -> None:
        try:
            self._write.write(json.dumps(message).encode() + b"\n")
            self._write.flush()
        except OSError:
            self._end("the code's process has ended")

    def _receive(self) -> dict[str, Any]:
        line = self._read.readline(_MAX_MESSAGE)
        try:
            reply = json.loads(line)
        except (ValueError, RecursionError):
            self._end("the code's process sends malformed replies" if line else "the code's process has ended")
        return reply if isinstance(reply, dict) else self._end("the code's process sends malformed replies")


class Remote:
    """The tests' stand-in for an object in the code's process."""

    def __init__(self, caller: Caller, handle: int, compares: bool) -> None:
        self._caller, self._handle, self._compares = caller, handle, compares

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name not in ("__name__", "__doc__"):
            raise AttributeError(name)
        return self._caller.ask(self._handle, "__getattribute__", args=(name,), kwargs={})

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Remote) and self._handle == other._handle:
            return True
        if self._compares or (isinstance(other, Remote) and other._compares):
            _refuse(self)
        return False

    __hash__ = object.__hash__


def _refuse(self: Remote, *_: Any) -> NoReturn:
    self._caller.refuse("the tests compare or compute with an object of the code's own")


def _forward(name: str) -> Callable[..., Any]:
    def method(self: Remote, *args: Any, **kwargs: Any) -> Any:
        return self._caller.ask(self._handle, name, args=args, kwargs=kwargs)

    return method


for _name in _FORWARDED.split():
    setattr(Remote, f"__{_name}__", _forward(f"__{_name}__"))
for _name in _REFUSED.split():
    setattr(Remote, f"__{_name}__", _refuse)


class Server:
    """The code's side: performs the calls of the tests and replies with their results."""

    def __init__(self, names: dict[str, Any], read: BinaryIO, write: BinaryIO) -> None:
        self._names, self._read, self._write = names, read, write
        self._objects: list[Any] = []

    def serve(self) -> None:
        """Answer calls until the other side ends."""
        while line := self._read.readline():
            self._send(self._answer(json.loads(line)))

    def _answer(self, message: dict[str, Any]) -> dict[str, Any]:
        given = decode(message["given"], self._resolve)
        try:
            value = self._perform(message, *given)
            reply = {"value": encode(value, self._export)}
        except BaseException as error:
            reply = {"error": [type(error).__name__, str(error)]}
        try:
            now = encode(given, self._export)
        except Exception:  # the code hid its own objects in an argument that contains itself
            return reply
        return reply if now == message["given"] else reply | {"given": now}

    def _perform(self, message: dict[str, Any], args: list[Any], kwargs: dict[str, Any]) -> Any:
        name = message["name"]
        if message["do"] == "name":
            if name not in self._names:
                raise NameError(f"name {name!r} is not defined")
            return self._names[name]
        target = self._objects[message["on"]]
        if name == "__getattribute__":
            return getattr(target, *args)
        if name in _FUNCTIONS:
            return _FUNCTIONS[name](target, *args)
        return getattr(target, name)(*args, **kwargs)

    def _export(self, value: Any) -> dict[str, Any]:
        self._objects.append(value)
        kind: Any = type(value)
        compares = kind.__eq__ is not object.__eq__ and not inspect.isroutine(value) and not inspect.isclass(value)
        return {"kind": kind.__name__, "handle": len(self._objects) - 1, "compares": compares}

    def _resolve(self, value: dict[str, Any]) -> Any:
        if "own" in value:
            return self._objects[value["own"]]
        if "builtin" in value:
            return getattr(builtins, value["builtin"])
        number = value["callback"]

        def call_back(*args: Any, **kwargs: Any) -> Any:
            self._send({"callback": number, "given": encode([list(args), kwargs], self._export)})
            reply = json.loads(self._read.readline())
            if "error" in reply:
                kind = getattr(builtins, reply["error"][0], RuntimeError)
                raise kind(reply["error"][1])
            return decode(reply["value"], self._resolve)

        return call_back

    def _send(self, message: dict[str, Any]) -> None:
        self._write.write(json.dumps(message).encode() + b"\n")
        self._write.flush()


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "__bool__": bool,
    "__str__": str,
    "__repr__": repr,
    "__int__": int,
    "__float__": float,
    "__len__": len,
    "__iter__": iter,
    "__instancecheck__": lambda kind, value: isinstance(value, kind),
}


def encode(value: Any, export: Callable[[Any], dict[str, Any]]) -> Any:
    """Return a value for JSON: plain values by content, subclasses as their base, other objects through `export`."""
    kind = type(value)
    if value is None or kind in (bool, float, str):
        return value
    if isinstance(value, int):
        return int(value) if -(1 << 63) < value < 1 << 63 else {"int": hex(int(value))}
    if isinstance(value, float):
        return float(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, list):
        return [encode(item, export) for item in list.__iter__(value)]
    for name, plain in _CONTAINERS.items():
        if isinstance(value, plain):
            return {name: [encode(item, export) for item in plain.__iter__(value)]}
    if isinstance(value, dict):
        return {"dict": [[encode(k, export), encode(v, export)] for k, v in dict.items(value)]}
    if isinstance(value, bytes | bytearray):
        return {"bytes" if isinstance(value, bytes) else "bytearray": bytes(value).hex()}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, Decimal | Fraction):
        return {"Decimal" if isinstance(value, Decimal) else "Fraction": str(value)}
    if kind.__module__ == "numpy" and hasattr(value, "item") and not getattr(value, "shape", 1):
        return encode(value.item(), export)
    return export(value)


_CONTAINERS: dict[str, Any] = {"tuple": tuple, "set": set, "frozenset": frozenset}
_SCALARS: dict[str, Callable[[Any], Any]] = {
    "int": lambda text: int(text, 16),
    "bytes": bytes.fromhex,
    "bytearray": bytearray.fromhex,
    "complex": lambda parts: complex(*parts),
    "Decimal": Decimal,
    "Fraction": Fraction,
}


def decode(value: Any, resolve: Callable[[dict[str, Any]], Any]) -> Any:
    """Return the value that `encode` was given; other objects come from `resolve`."""
    if isinstance(value, list):
        return [decode(item, resolve) for item in value]
    if not isinstance(value, dict):
        return value
    name, content = next(iter(value.items()))
    if name in _CONTAINERS:
        return _CONTAINERS[name](decode(item, resolve) for item in content)
    if name == "dict":
        return {decode(k, resolve): decode(v, resolve) for k, v in content}
    if name in _SCALARS:
        return _SCALARS[name](content)
    return resolve(value)


def refill(old: Any, new: Any) -> None:
    """Apply a call's changes to mutable plain values, in place, at every depth."""
    if isinstance(old, list) and isinstance(new, list):
        old[:] = [_kept(a, b) for a, b in zip(old, new, strict=False)] + new[len(old) :]
    elif isinstance(old, dict) and isinstance(new, dict):
        kept = {key: _kept(old[key], new[key]) if key in old else new[key] for key in new}
        old.clear()
        old.update(kept)
    elif isinstance(old, set) and isinstance(new, set):
        old.clear()
        old.update(new)
    elif isinstance(old, bytearray) and isinstance(new, bytearray):
        old[:] = new
    elif isinstance(old, tuple) and isinstance(new, tuple):
        for a, b in zip(old, new, strict=False):
            refill(a, b)


def _kept(old: Any, new: Any) -> Any:
    if isinstance(old, list | dict | set | bytearray) and type(old) is type(new):
        refill(old, new)
        return old
    return new
