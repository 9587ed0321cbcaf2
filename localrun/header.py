"""Read a GGUF's header back: metadata and where every tensor's bytes stand, without trusting the writer.

`gguf.GGUFReader` makes numpy views of every token's text, which takes longer than quantizing a small model; this reads
the header once, front to back.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from ..errors import ArtifactError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST = 1 << 32  # elements or characters that a whole file could hold: more is garbage


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file: numpy shape `[..., n_per_row]`, type, and its bytes' place counted from the file's start."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int
    n_bytes: int


@dataclass(frozen=True)
class Header:
    """What a file says about itself."""

    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]


def read_gguf(path: Path) -> Header:
    """Return a file's header, after checking that all the data it names is in the file.

    Raises:
        ArtifactError: it is no GGUF, broken, or cut short.
    """
    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ValueError("it does not begin with GGUF")
            version, n_tensors, n_entries = _unpack(file, "IQQ")
            if version not in (2, 3):
                raise ValueError(f"version {version}")
            metadata = {_string(file): _value(file, _unpack(file, "I")[0]) for _ in range(_sane(n_entries))}
            entries = [_tensor(file) for _ in range(_sane(n_tensors))]
            alignment = int(metadata.get("general.alignment", 32))
            start = -(-file.tell() // alignment) * alignment
    except (ValueError, struct.error, OSError, OverflowError) as error:
        raise ArtifactError(f"{path} is no whole GGUF file: {error}") from error
    tensors = {name: StoredTensor(name, shape, type_, start + at, n) for name, shape, type_, at, n in entries}
    size = path.stat().st_size
    for tensor in tensors.values():
        if tensor.offset + tensor.n_bytes > size:
            raise ArtifactError(f"{path} is cut short: {tensor.name} ends after the file")
    return Header(metadata, tensors)


def _unpack(file: BinaryIO, form: str) -> tuple[Any, ...]:
    layout = struct.Struct("<" + form)
    return layout.unpack(file.read(layout.size))


def _sane(n: int) -> int:
    if n > _MOST:
        raise ValueError("a length is garbage")
    return n


def _string(file: BinaryIO) -> str:
    n = _sane(_unpack(file, "Q")[0])
    data = file.read(n)
    if len(data) != n:
        raise ValueError("it is cut short")
    return data.decode("utf-8")


def _strings(file: BinaryIO, n: int) -> list[str]:
    """Return n strings; a vocabulary and its merges hold a hundred thousand, and every chat waits for them."""
    read, length_of = file.read, struct.Struct("<Q").unpack
    found = []
    for _ in range(n):
        size = _sane(length_of(read(8))[0])
        data = read(size)
        if len(data) != size:
            raise ValueError("it is cut short")
        found.append(data.decode("utf-8"))
    return found


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _string(file)
    if kind == _ARRAY:
        inner, n = _unpack(file, "IQ")
        if inner in _SCALARS:
            return list(_unpack(file, f"{_sane(n)}{_SCALARS[inner]}"))
        return _strings(file, _sane(n)) if inner == _STRING else [_value(file, inner) for _ in range(_sane(n))]
    if kind not in _SCALARS:
        raise ValueError(f"a value of type {kind}")
    return _unpack(file, _SCALARS[kind])[0]


def _tensor(file: BinaryIO) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int, int]:
    """Return (name, shape, type, offset in the data, bytes)."""
    name = _string(file)
    shape = _unpack(file, f"{_sane(_unpack(file, 'I')[0])}Q")[::-1]
    number, offset = _unpack(file, "IQ")
    type_ = GGMLQuantizationType(number)
    block, block_bytes = GGML_QUANT_SIZES[type_]
    if not shape or shape[-1] % block:
        raise ValueError(f"{name} has rows of {shape[-1:]} in {type_.name}")
    return name, shape, type_, offset, math.prod(shape) // block * block_bytes
