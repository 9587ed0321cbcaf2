"""Cut a GGUF into shards as llama.cpp's gguf-split does: for browsers, which hold no large file, and for hosts' limits.

Every shard is a GGUF of its own; the first one holds all the metadata. llama.cpp, and wllama in a browser, are given
the first shard and find the others by their names. Bytes are copied unchanged, tensor by tensor.

Source: llama.cpp's tools/gguf-split for the format. Ours exceeds the size only where one tensor does.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

from ...errors import ArtifactError
from .header import StoredTensor, read_gguf

MAX_SHARD_BYTES = 64_000_000
"""Bytes of tensors. A download that breaks off loses one shard, and free hosts take files up to 100 MB."""

_NAME = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
_UINT16, _UINT32, _INT32 = (2, "H"), (4, "I"), (5, "i")  # GGUF's numbers of value types, and struct's letters
_PREAMBLE = 24  # bytes: the magic, the version and two counts
_PIECE = 1 << 22  # bytes in memory at once


def is_shard(path: Path) -> bool:
    """Say whether a file's name is that of a part of a split model."""
    return _NAME.search(path.name) is not None


def other_shards(path: Path) -> list[Path]:
    """Return the other files of a split model; none if a file is not a part of one."""
    if not (found := _NAME.search(path.name)):
        return []
    parts = path.parent.glob(f"{path.name[: found.start()]}-*-of-{found[2]}.gguf")
    return sorted(part for part in parts if part != path)


def split_gguf(path: Path, folder: Path, max_bytes: int = MAX_SHARD_BYTES) -> list[Path]:
    """Write a file's shards, `NAME-00001-of-00003.gguf` and so on, into a folder that exists; return their paths.

    Raises:
        ArtifactError: code "is-shard" or "no-tensors", or see `read_gguf`.
    """
    header = read_gguf(path)
    if any(name.startswith("split.") for name in header.metadata):
        raise ArtifactError(f"{path} is part of a split model", "give the whole model in one file", code="is-shard")
    if not header.tensors:
        raise ArtifactError(f"{path} has no tensors", "give a model", code="no-tensors")
    with path.open("rb") as source:
        entries = source.read(header.table_at)[_PREAMBLE:]
    groups = _groups(list(header.tensors.values()), max_bytes)
    alignment = int(header.metadata.get("general.alignment", 32))
    written = []
    for number, group in enumerate(groups):
        shard = folder / f"{path.stem}-{number + 1:05d}-of-{len(groups):05d}.gguf"
        split_info = [
            _entry("split.no", _UINT16, number),
            _entry("split.count", _UINT16, len(groups)),
            _entry("split.tensors.count", _INT32, len(header.tensors)),
        ]
        if number == 0:
            n, metadata = len(header.metadata) + len(split_info), entries + b"".join(split_info)
        else:
            split_info += [_entry("general.alignment", _UINT32, alignment)] if alignment != 32 else []
            n, metadata = len(split_info), b"".join(split_info)
        with path.open("rb") as source, shard.open("wb") as file:
            _write_shard(source, file, n_entries=n, metadata=metadata, tensors=group, alignment=alignment)
        written.append(shard)
    return written


def _groups(tensors: Sequence[StoredTensor], max_bytes: int) -> list[list[StoredTensor]]:
    """Return the tensors of each shard, in the file's order."""
    groups: list[list[StoredTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + tensor.n_bytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.n_bytes
    return groups


def _write_shard(
    source: BinaryIO,
    file: BinaryIO,
    *,
    n_entries: int,
    metadata: bytes,
    tensors: Sequence[StoredTensor],
    alignment: int,
) -> None:
    file.write(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), n_entries) + metadata)
    at = 0
    for tensor in tensors:
        file.write(_table_row(tensor, at))
        at += _padded(tensor.n_bytes, alignment)
    for tensor in tensors:
        file.write(bytes(_padded(file.tell(), alignment) - file.tell()))
        source.seek(tensor.offset)
        for piece in _pieces(source, tensor.n_bytes):
            file.write(piece)
    file.write(bytes(_padded(file.tell(), alignment) - file.tell()))


def _pieces(source: BinaryIO, n_bytes: int) -> Iterable[bytes]:
    while n_bytes:
        piece = source.read(min(n_bytes, _PIECE))
        n_bytes -= len(piece)
        yield piece


def _table_row(tensor: StoredTensor, offset: int) -> bytes:
    """Return the row of a file's table for a tensor whose bytes start at this offset of the data."""
    dimensions = tensor.shape[::-1]
    row = _string(tensor.name) + struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions)
    return row + struct.pack("<IQ", tensor.type, offset)


def _entry(key: str, kind: tuple[int, str], value: int) -> bytes:
    number, letter = kind
    return _string(key) + struct.pack(f"<I{letter}", number, value)


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _padded(n: int, alignment: int) -> int:
    return -(-n // alignment) * alignment
