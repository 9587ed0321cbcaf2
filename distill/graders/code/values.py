"""Plain values as JSON has them, without loss: a tuple is no list, 1 is not 1.0, and a number has all its digits.

What is no plain value goes through the caller's `export` and `resolve`, see wire.py.
"""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any


def encode(value: Any, export: Callable[[Any], dict[str, Any]]) -> Any:
    """Return a value as JSON has it: plain ones by content, subclasses as what they extend, others through `export`."""
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
    """Return the value that `encode` was given; handles go through `resolve`."""
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
    """Make mutable plain values what the call has made of them, in place, nested ones included."""
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
