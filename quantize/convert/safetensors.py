"""Weights in safetensors files, read on demand and without torch.

A weight is anything with a shape whose rows come as float32: a tensor of a file, fp8 with a scale for each block, or a
tensor with a LoRA adapter's product added (lora_adapter.py). Rows are read, not mapped: a page of a mapped file counts
as this process's memory, and a 671B checkpoint has many. numpy has no bf16: its 16 bits are the upper half of a
float32, so a shift widens it without loss.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from ...errors import ArtifactError, ModelError

_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "F8_E4M3": "u1"}


@dataclass(frozen=True)
class Weight(ABC):
    """A matrix, vector or stack of matrices: its name in the checkpoint, and its shape there, rows first."""

    name: str
    shape: tuple[int, ...]

    @abstractmethod
    def rows(self, part: slice = slice(None)) -> npt.NDArray[np.float32]:
        """Read a range of its first axis, as float32."""


@dataclass(frozen=True)
class Tensor(Weight):
    """A tensor's place in a file."""

    dtype: str
    path: Path
    offset: int

    def rows(self, part: slice = slice(None)) -> npt.NDArray[np.float32]:
        """Read a range of its first axis, as float32.

        Raises:
            ArtifactError: `code` "file-unreadable", or "safetensors-broken": the file is cut short.
        """
        start, stop, _ = part.indices(self.shape[0])
        width, dtype = math.prod(self.shape[1:]), np.dtype(_DTYPES[self.dtype])
        n = max(0, stop - start) * width
        try:
            raw = np.fromfile(self.path, dtype, n, offset=self.offset + start * width * dtype.itemsize)
        except OSError as error:
            raise ArtifactError(
                f"cannot read {self.path}: {error.strerror or error}", code="file-unreadable"
            ) from error
        if raw.size != n:
            raise _broken(self.path, f"it ends before {self.name} does")
        raw = raw.reshape(-1, *self.shape[1:])
        if self.dtype == "BF16":
            wide = raw.astype(np.uint32)
            wide <<= 16
            return wide.view(np.float32)
        return _e4m3()[raw] if self.dtype == "F8_E4M3" else raw.astype(np.float32, copy=False)

    def flat(self) -> Tensor:
        """Return it with all axes but the last merged: a stack of matrices as one matrix."""
        return dataclasses.replace(self, shape=(math.prod(self.shape[:-1]), self.shape[-1]))


@dataclass(frozen=True)
class Blocks(Weight):
    """An fp8 matrix with a scale for each of its blocks, as DeepSeek publishes its models."""

    weight: Tensor
    scale: Tensor
    block: tuple[int, int]

    def rows(self, part: slice = slice(None)) -> npt.NDArray[np.float32]:
        """Read a range of its rows, as float32."""
        start, stop, _ = part.indices(self.shape[0])
        first = start // self.block[0]
        scales = self.scale.rows(slice(first, -(-stop // self.block[0])))
        wide = np.repeat(scales, self.block[1], axis=1)[:, : self.shape[1]]
        rows = self.weight.rows(part)
        rows *= wide[np.arange(start, stop) // self.block[0] - first]
        return rows


@functools.cache
def _e4m3() -> npt.NDArray[np.float32]:
    """Return the 256 values of fp8 E4M3: a sign, four bits of exponent with a bias of 7, three bits of fraction."""
    bits = np.arange(256)
    exponent, fraction = bits >> 3 & 15, (bits & 7) / 8
    size = np.where(exponent == 0, fraction * 2.0**-6, (1 + fraction) * 2.0 ** (exponent - 7.0))
    size[bits & 127 == 127] = np.nan  # the only special value: E4M3 has no infinity
    return np.where(bits < 128, size, -size).astype(np.float32)


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object from a file.

    Raises:
        ArtifactError: `code` "json-broken".
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ArtifactError(f"{path} is broken: {error}", code="json-broken") from error
    if not isinstance(found, dict):
        raise ArtifactError(f"{path} is broken: it is not a JSON object", code="json-broken")
    return found


def read_header(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file.

    Raises:
        ArtifactError: `code` "safetensors-broken".
        ModelError: `code` "unsupported-dtype".
    """
    try:
        with safe_open(path, "numpy") as file:
            stored = {name: file.get_slice(name) for name in file.offset_keys()}
            entries = {name: (tuple(one.get_shape()), str(one.get_dtype())) for name, one in stored.items()}
    except (SafetensorError, OSError) as error:
        raise _broken(path, str(error)) from error
    tensors, end = dict[str, Tensor](), path.stat().st_size  # the tensors follow each other and fill the file
    for name, (shape, dtype) in reversed(entries.items()):
        if dtype not in _DTYPES:
            message = f"deepdistill cannot read {name} in {path.name}, which is {dtype}"
            hint = f"save the weights as one of {', '.join(sorted(_DTYPES))}"
            raise ModelError(message, hint, code="unsupported-dtype")
        end -= math.prod(shape) * np.dtype(_DTYPES[dtype]).itemsize
        tensors[name] = Tensor(name, shape, dtype, path, end)
    return dict(reversed(tensors.items()))


def _broken(path: Path, reason: str) -> ArtifactError:
    return ArtifactError(
        f"{path} is not a whole safetensors file: {reason}", "copy it again", code="safetensors-broken"
    )
