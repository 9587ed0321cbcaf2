"""Weights as a checkpoint stores them, read from safetensors files when asked for, without torch.

A weight is anything with a shape whose rows come as float32: a tensor of a file, fp8 with a scale for each block, or a
tensor with a LoRA adapter's product added (see adapter.py). Rows are read, not mapped: a page of a mapped file counts
as this process's memory, and a 671B checkpoint has many. bf16 has no numpy type: its 16 bits are the upper half of a
float32, so it is widened by a shift, without loss.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ...errors import ArtifactError, ModelError

_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "F8_E4M3": "u1"}
_HEADER_LIMIT = 100_000_000  # bytes; safetensors' own


class Weight(Protocol):
    """A matrix, vector or stack of matrices, read in ranges of its first axis."""

    @property
    def name(self) -> str:
        """The checkpoint's name of it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The checkpoint's own shape, rows first."""

    def rows(self, part: slice = slice(None)) -> npt.NDArray[np.float32]:
        """Return a range of its first axis as float32, read from the file now."""


@dataclass(frozen=True)
class Tensor:
    """Where a tensor stands in a file."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    path: Path
    offset: int

    def rows(self, part: slice = slice(None)) -> npt.NDArray[np.float32]:
        """Return a range of its first axis as float32, read from the file now."""
        start, stop, _ = part.indices(self.shape[0])
        width, dtype = math.prod(self.shape[1:]), np.dtype(_DTYPES[self.dtype])
        n = max(0, stop - start) * width
        try:
            raw = np.fromfile(self.path, dtype, n, offset=self.offset + start * width * dtype.itemsize)
        except OSError as error:
            raise ArtifactError(f"cannot read {self.path}: {error.strerror or error}") from error
        if raw.size != n:
            raise ArtifactError(f"{self.path} is cut short: {self.name} ends after the file", "copy it again")
        raw = raw.reshape(-1, *self.shape[1:])
        if self.dtype == "BF16":
            wide = raw.astype(np.uint32)
            wide <<= 16
            return wide.view(np.float32)
        return _e4m3()[raw] if self.dtype == "F8_E4M3" else raw.astype(np.float32, copy=False)

    def flat(self) -> Tensor:
        """Return it with all axes but the last as one: a stack of matrices as one matrix."""
        return dataclasses.replace(self, shape=(math.prod(self.shape[:-1]), self.shape[-1]))


@dataclass(frozen=True)
class Blocks:
    """An fp8 matrix with a scale for each block of it, as DeepSeek publishes its models."""

    weight: Tensor
    scale: Tensor
    block: tuple[int, int]

    @property
    def name(self) -> str:
        """The checkpoint's name of it."""
        return self.weight.name

    @property
    def shape(self) -> tuple[int, ...]:
        """The matrix's shape, rows first."""
        return self.weight.shape

    def rows(self, part: slice = slice(None)) -> npt.NDArray[np.float32]:
        """Return a range of its rows as float32."""
        start, stop, _ = part.indices(self.shape[0])
        first = start // self.block[0]
        scales = self.scale.rows(slice(first, -(-stop // self.block[0])))
        wide = np.repeat(scales, self.block[1], axis=1)[:, : self.shape[1]]
        rows = self.weight.rows(part)
        rows *= wide[np.arange(start, stop) // self.block[0] - first]
        return rows


@functools.cache
def _e4m3() -> npt.NDArray[np.float32]:
    """Return the 256 values of fp8 E4M3: a sign, four bits of exponent biased by 7, three of fraction; no infinity."""
    bits = np.arange(256)
    exponent, fraction = bits >> 3 & 15, (bits & 7) / 8
    size = np.where(exponent == 0, fraction * 2.0**-6, (1 + fraction) * 2.0 ** (exponent - 7.0))
    size[bits & 127 == 127] = np.nan
    return np.where(bits < 128, size, -size).astype(np.float32)


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object from a file.

    Raises:
        ArtifactError: it is broken, or no object.
    """
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ArtifactError(f"{path} is broken: {error}") from error
    if not isinstance(read, dict):
        raise ArtifactError(f"{path} is broken: it is no JSON object")
    return read


def read_header(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file.

    Raises:
        ArtifactError: it is no safetensors file, or cut short.
        ModelError: a tensor has a type that cannot be converted.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            n_header = int.from_bytes(file.read(8), "little")
            if not 2 <= n_header <= min(_HEADER_LIMIT, size - 8):
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(n_header))
        header.pop("__metadata__", None)
        entries = [(name, tuple(e["shape"]), e["dtype"], *e["data_offsets"]) for name, e in header.items()]
        if any(type(n) is not int or n < 0 for _, shape, _, *span in entries for n in (*shape, *span)):
            raise ValueError("a size or place is no whole number")
        if any(len(entry) != 5 for entry in entries):
            raise ValueError("a tensor's place is not a beginning and an end")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path} is no whole safetensors file: {error}", "copy it again") from error
    tensors = {}
    for name, shape, dtype, start, end in entries:
        if 8 + n_header + end > size:
            raise ArtifactError(f"{path} is cut short: {name} ends after the file", "copy it again")
        if dtype not in _DTYPES:
            raise ModelError(f"{name} in {path.name} is {dtype}", f"weights must be {', '.join(sorted(_DTYPES))}")
        if end - start != math.prod(shape) * np.dtype(_DTYPES[dtype]).itemsize:
            raise ArtifactError(f"{path} is broken: {name} has the wrong number of bytes", "copy it again")
        tensors[name] = Tensor(name, shape, dtype, path, 8 + n_header + start)
    return tensors
