"""Which rows of a checkpoint's weights become which rows of a file's tensors.

An architecture permutes, splits and stacks rows. To find out where each row goes, whatever the architecture does, it is
given a checkpoint in which every row holds its own number.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ...errors import ModelError
from .architectures import read_architecture
from .checkpoint import Checkpoint
from .safetensors import Tensor, Weight

_MAX_ROWS = 1 << 24  # float32 holds every whole number up to here


@dataclass(frozen=True)
class Origin:
    """Rows of one weight of the checkpoint in a tensor: their numbers in the weight, and their matrix in the stack."""

    weight: str
    rows: npt.NDArray[np.int64]
    matrix: npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Numbered(Tensor):
    """A weight whose rows hold their numbers, counted through the whole checkpoint; `first` is its first row's."""

    first: int = 0

    def rows(self, part: slice = slice(None)) -> npt.NDArray[np.float32]:
        start, stop, _ = part.indices(self.shape[0])
        inner = math.prod(self.shape[1:-1])
        numbers = self.first + np.arange(start * inner, stop * inner, dtype=np.float32)
        if len(self.shape) == 1:
            return numbers
        numbers = numbers.reshape(-1, *self.shape[1:-1], 1)
        return np.ascontiguousarray(np.broadcast_to(numbers, (max(0, stop - start), *self.shape[1:])))


def origins(
    folder: Path, names: Collection[str], weights: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[Origin, ...]]:
    """Return where the rows of the named tensors come from.

    Args:
        folder: the checkpoint.
        names: the tensors.
        weights: the shapes of the model's weights by name, which may be stacked in another way than in the folder.

    Returns:
        The origins by tensor, without tensors that do not consist of whole rows, such as DeepSeek's `attn_k_b`, which
        is transposed.

    Raises:
        ModelError: `code` "too-many-rows", or "not-convertible": the weights do not fit the folder's config.
        ArtifactError: the checkpoint is broken.
    """
    checkpoint = Checkpoint(folder)
    numbered = _numbered(weights, folder)
    checkpoint.tensors = dict[str, Weight](numbered)
    keys, firsts = list(numbered), np.array([one.first for one in numbered.values()])
    found = {}
    for planned in read_architecture(checkpoint).tensors():
        if planned.name not in names:
            continue
        parts = list(planned.read())
        if any(part.ndim != 2 or (part != part[:, :1]).any() for part in parts):
            continue  # a row that mixes numbers comes from several rows
        numbers = np.concatenate([part[:, 0] for part in parts]).astype(np.int64)
        which = np.searchsorted(firsts, numbers, side="right") - 1
        found[planned.name] = tuple(
            Origin(keys[i], numbers[which == i] - firsts[i], np.flatnonzero(which == i) // planned.shape[-2])
            for i in np.unique(which)
        )
    return found


def _numbered(weights: Mapping[str, tuple[int, ...]], folder: Path) -> dict[str, _Numbered]:
    """Return weights of these shapes whose rows are numbered one after the other."""
    numbered, n_rows = dict[str, _Numbered](), 0
    for name, shape in weights.items():
        numbered[name] = _Numbered(name, shape, "F32", folder, 0, n_rows)
        n_rows += math.prod(shape[:-1] if len(shape) > 1 else shape)
    if n_rows > _MAX_ROWS:
        message = f"{folder} has {n_rows:,} rows of weights, and healing can tell {_MAX_ROWS:,} apart"
        raise ModelError(message, "leave out --heal", code="too-many-rows")
    return numbered
