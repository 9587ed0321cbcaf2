"""Read a GGUF's header back: metadata and where every tensor's bytes are, without trusting the writer.

Every length is compared with the rest of the file before it is used, so that a file can neither ask for more memory
than its size, nor loop, nor name bytes that do not exist. Whoever maps or loads a file reads it here first.
`gguf.GGUFReader` makes numpy views of every token's text, which takes longer than quantizing a small model; this reads
the header once, front to back.

Source: https://github.com/ggml-org/ggml, docs/gguf.md; stricter than it where llama.cpp is.
"""

from __future__ import annotations

import itertools
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ...errors import ArtifactError
from . import GGML_QUANT_SIZES, GGMLQuantizationType

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_SIZES = {kind: struct.calcsize(f"<{form}") for kind, form in _SCALARS.items()} | {8: 8, 9: 12}  # bytes at least
_STRING, _ARRAY = 8, 9
_CHUNK = 1 << 20  # bytes read at a time
# Far above what any model has: a file that asks for more is broken, or attacks our memory.
_MOST_BYTES, _MOST_ELEMENTS, _MOST_ENTRIES, _MOST_NAME, _DEEPEST = 1 << 28, 1 << 23, 1 << 20, 1 << 16, 4
_MOST_DIMENSIONS, _MOST_ALIGNMENT = 4, 1 << 16
_LEAST_ENTRY, _LEAST_TENSOR = 13, 33  # bytes


_HINT = "download or quantize it again"


class UnknownTypeError(ArtifactError):
    """A tensor has a type that the installed `gguf` does not name; llama.cpp may know it."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file: numpy shape `[..., n_per_row]`, type, and the offset of its bytes from the file's start."""

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
    table_at: int
    """Where the table of tensors begins, in bytes from the file's start: the metadata comes before it."""


def read_gguf(path: Path) -> Header:
    """Return a file's header, after checking that all the data it names is in the file and does not overlap.

    Raises:
        ArtifactError: code "gguf-broken" or "gguf-cut-short"; UnknownTypeError, code "type-unknown": it may be newer
            than the installed `gguf`.
    """
    try:
        with path.open("rb") as file:
            return _Reader(file).header()
    except UnknownTypeError as error:
        raise UnknownTypeError(f"{path}: {error.message}", error.hint, code=error.code) from error
    except _CutShortError as error:
        raise ArtifactError(f"{path} is cut short: {error}", _HINT, code="gguf-cut-short") from error
    except (ValueError, struct.error, OSError, OverflowError) as error:
        raise ArtifactError(f"{path} is not a valid GGUF file: {error}", _HINT, code="gguf-broken") from error


class _CutShortError(Exception):
    """A file's beginning is valid, and its end is missing."""


class _Reader:
    """A file's beginning, read only as far as needed."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.data, self.at = file, b"", 0
        self.size = os.fstat(file.fileno()).st_size
        self.n_elements = 0  # of all arrays so far

    def header(self) -> Header:
        """Return everything, checked."""
        if self.take(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        version, n_tensors, n_entries = self.unpack("IQQ")
        if version not in (2, 3):
            raise ValueError(f"version {version}")
        self.room(n_tensors, _LEAST_TENSOR, _MOST_ENTRIES)
        self.room(n_entries, _LEAST_ENTRY, _MOST_ENTRIES)
        metadata: dict[str, Any] = {}
        for _ in range(n_entries):
            name = self.name()
            if name in metadata:
                raise ValueError(f"{name} appears twice")
            metadata[name] = self.value(self.unpack("I")[0])
        alignment = metadata.get("general.alignment", 32)
        # A power of two; True is not one, although Python takes it for 1.
        if type(alignment) is not int or not 0 < alignment <= _MOST_ALIGNMENT or alignment & (alignment - 1):
            raise ValueError(f"an alignment of {alignment!r}"[:80])
        table_at, tensors = self.at, dict[str, StoredTensor]()
        for _ in range(n_tensors):
            tensor = self.tensor(alignment)
            if tensor.name in tensors:
                raise ValueError(f"{tensor.name} appears twice")
            tensors[tensor.name] = tensor
        return Header(metadata, self.placed(tensors, alignment), table_at)

    def placed(self, tensors: dict[str, StoredTensor], alignment: int) -> dict[str, StoredTensor]:
        """Return the tensors with offsets from the file's start, after checking that all are in it and none overlap."""
        start = -(-self.at // alignment) * alignment
        found = {name: StoredTensor(name, t.shape, t.type, start + t.offset, t.n_bytes) for name, t in tensors.items()}
        for tensor in found.values():
            if tensor.offset + tensor.n_bytes > self.size:
                raise _CutShortError(f"{tensor.name} ends after the file")
        ordered = sorted(found.values(), key=lambda tensor: tensor.offset)
        for before, after in itertools.pairwise(ordered):
            if before.offset + before.n_bytes > after.offset:
                raise ValueError(f"{before.name} and {after.name} overlap")
        return found

    def take(self, n: int) -> bytes:
        """Return the next n bytes."""
        end = self.at + n
        if end > len(self.data):
            self.fill(end)
        found = self.data[self.at : end]
        self.at = end
        return found

    def fill(self, end: int) -> None:
        """Read until `end`, and a little more."""
        if end > self.size:
            raise ValueError("it is cut short")
        if end > _MOST_BYTES:
            raise ValueError(f"its metadata is longer than {_MOST_BYTES >> 20} MiB")
        self.data += self.file.read(max(end - len(self.data), _CHUNK, len(self.data)))
        if end > len(self.data):
            raise ValueError("it is cut short")

    def room(self, n: int, least: int, most: int) -> None:
        """Check that the rest of the file can hold n items of at least so many bytes each."""
        if n > most or n * least > self.size - self.at:
            raise ValueError(f"it is cut short, or announces {n:,} items")

    def unpack(self, form: str) -> tuple[Any, ...]:
        """Return the next numbers."""
        layout = struct.Struct("<" + form)
        return layout.unpack(self.take(layout.size))

    def string(self) -> str:
        """Return the next string."""
        n = self.unpack("Q")[0]
        self.room(n, 1, _MOST_BYTES)
        return self.take(n).decode("utf-8")

    def name(self) -> str:
        """Return the next string, which names something."""
        name = self.string()
        if not 0 < len(name) < _MOST_NAME:
            raise ValueError(f"a name of {len(name):,} characters")
        return name

    def strings(self, n: int) -> list[str]:
        """Return n strings; fast, as a vocabulary with its merges has 100,000 and every chat waits for them."""
        length_of, found = struct.Struct("<Q").unpack_from, []
        at = self.at
        for _ in range(n):
            if at + 8 > len(self.data):
                self.fill(at + 8)
            end = at + 8 + length_of(self.data, at)[0]
            if end > len(self.data):
                self.fill(end)
            found.append(str(self.data[at + 8 : end], "utf-8"))
            at = end
        self.at = at
        return found

    def value(self, kind: int, depth: int = 0) -> Any:
        """Return the next value, of a type by its number."""
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array(depth)
        if kind not in _SCALARS:
            raise ValueError(f"a value of type {kind}")
        return self.unpack(_SCALARS[kind])[0]

    def array(self, depth: int) -> list[Any]:
        """Return the next array; arrays may not be nested deeply."""
        kind, n = self.unpack("IQ")
        if kind not in _SIZES or depth >= _DEEPEST:
            raise ValueError(f"an array of type {kind}, {depth} deep")
        self.room(n, _SIZES[kind], _MOST_ELEMENTS)
        self.n_elements += n
        if self.n_elements > _MOST_ELEMENTS:
            raise ValueError("its arrays are too long")
        if kind in _SCALARS:
            return list(self.unpack(f"{n}{_SCALARS[kind]}"))
        return self.strings(n) if kind == _STRING else [self.array(depth + 1) for _ in range(n)]

    def tensor(self, alignment: int) -> StoredTensor:
        """Return the next row of the table of tensors, its offset counted from the data's start."""
        name = self.name()
        n_dimensions = self.unpack("I")[0]
        if not 0 < n_dimensions <= _MOST_DIMENSIONS:
            raise ValueError(f"{name} has {n_dimensions} dimensions")
        shape = self.unpack(f"{n_dimensions}Q")[::-1]
        number, offset = self.unpack("IQ")
        try:
            type_ = GGMLQuantizationType(number)
        except ValueError:
            raise UnknownTypeError(
                f"{name} has an unknown type, {number}", "pip install -U gguf", code="type-unknown"
            ) from None
        block, block_bytes = GGML_QUANT_SIZES[type_]
        if not all(shape) or shape[-1] % block:
            raise ValueError(f"{name} is {list(shape)} in {type_.name}")
        if offset % alignment:
            raise ValueError(f"{name} is not aligned")
        return StoredTensor(name, shape, type_, offset, math.prod(shape) // block * block_bytes)
