"""Calls between the tests and the code they test, each in its own process: only plain values cross.

A value that crosses is rebuilt from JSON on the side of the tests, so its `==`, its length and its truth are Python's
own and not the code's. What is no plain value stays where it is and crosses as a handle; a handle can be called, asked
for attributes, items and its length, but no comparison and no arithmetic is left to it: the code would judge itself.
"""

from __future__ import annotations

import builtins
import inspect
import json
from collections.abc import Callable
from typing import Any, BinaryIO, NoReturn

from .values import decode, encode, refill

_MAX_MESSAGE = 16 << 20
# Special methods, without their underscores.
_FORWARDED = "call len iter next getitem setitem delitem bool int float str repr enter exit instancecheck"
_REFUSED = (
    "ne lt le gt ge contains add radd sub rsub mul rmul truediv rtruediv floordiv rfloordiv mod rmod pow rpow matmul "
    "and rand or ror xor rxor neg abs round index mro_entries await aiter"
)


class Undecided(BaseException):
    """The tests need what cannot cross, or would have the code judge itself: the verdict is unknown."""


class Gone(BaseException):
    """The code's process failed to start, has ended, or talks nonsense."""


class ForeignError(Exception):
    """An exception of a class that only the code knows."""


class Caller:
    """The side of the tests: asks the code's process, and answers when the code calls a function it was given.

    `undecided` and `gone` keep why it stopped, since a test may catch every exception.
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
        """Return what the code calls by this name.

        Raises:
            NameError: nothing.
        """
        return self._ask({"do": "name", "name": name}, (), {})

    def ask(self, handle: int, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a method of what a handle stands for."""
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
                    raise self._error(*reply["error"])
                return decode(reply["value"], self._resolve)
            except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError):
                if "error" in reply:
                    raise
                self._end("the code answers nonsense")

    def _call_back(self, reply: dict[str, Any]) -> dict[str, Any]:
        args, kwargs = decode(reply["given"], self._resolve)
        function = self._callbacks[reply["callback"]]
        try:
            return {"value": encode(function(*args, **kwargs), self._export)}
        except Exception as error:
            return {"error": [type(error).__name__, str(error)]}

    def _error(self, name: str, text: str) -> Exception:
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
            self._end("the code answers nonsense" if line else "the code's process has ended")
        return reply if isinstance(reply, dict) else self._end("the code answers nonsense")


class Remote:
    """Something of the code's, by its handle."""

    def __init__(self, caller: Caller, handle: int, compares: bool) -> None:
        self._caller, self._handle, self._compares = caller, handle, compares

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name not in ("__name__", "__doc__"):
            raise AttributeError(name)
        return self._caller.ask(self._handle, "__getattribute__", (name,), {})

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
        return self._caller.ask(self._handle, name, args, kwargs)

    return method


for _name in _FORWARDED.split():
    setattr(Remote, f"__{_name}__", _forward(f"__{_name}__"))
for _name in _REFUSED.split():
    setattr(Remote, f"__{_name}__", _refuse)


class Server:
    """The side of the code: does what it is asked and says what came of it."""

    def __init__(self, names: dict[str, Any], read: BinaryIO, write: BinaryIO) -> None:
        self._names, self._read, self._write = names, read, write
        self._objects: list[Any] = []

    def serve(self) -> None:
        """Answer until the other side has ended."""
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
        except Exception:  # the code hides its own objects in an argument that holds itself
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
