"""Which rows of a checkpoint's weights become which rows of a file's tensors.

An architecture permutes, splits and stacks rows. It is given a checkpoint whose every row holds its own number, and
what it makes of that says where each row went, whatever the architecture does.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ...errors import ModelError
from .architectures import read_architecture
from .checkpoint import Checkpoint
from .safetensors import Tensor, Weight

_MOST = 1 << 24  # whole numbers that float32 holds


@dataclass(frozen=True)
class Origin:
    """Rows of one weight of the checkpoint that stand in a tensor: their numbers there, and their matrix in a stack."""

    weight: str
    rows: npt.NDArray[np.int64]
    matrix: npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Numbered(Tensor):
    """A weight whose rows hold their numbers, counted over the whole checkpoint from `first`."""

    first: int = 0

    def rows(self, part: slice = slice(None)) -> npt.NDArray[np.float32]:
        start, stop, _ = part.indices(self.shape[0])
        inner = int(np.prod(self.shape[1:-1])) if len(self.shape) > 2 else 1
        numbers = self.first + np.arange(start * inner, stop * inner, dtype=np.float32)
        if len(self.shape) == 1:
            return numbers
        numbers = numbers.reshape(-1, *self.shape[1:-1], 1)
        return np.ascontiguousarray(np.broadcast_to(numbers, (max(0, stop - start), *self.shape[1:])))


def origins(
    folder: Path, names: Collection[str], weights: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[Origin, ...]]:
    """Return where the rows of the named tensors come from.

    `weights` has the shapes of the model's weights by name, which may be stacked otherwise than in the folder. Tensors
    that are no arrangement of whole rows, such as DeepSeek's transposed `attn_k_b`, are left out.

    Raises:
        ModelError: the weights are not what the folder's config says.
        ArtifactError: the checkpoint is broken.
    """
    checkpoint = Checkpoint(folder)
    numbered, starts = dict[str, Weight](), dict[str, int]()
    at = 0
    for name, shape in weights.items():
        starts[name] = at
        numbered[name] = _Numbered(name, shape, "F32", folder, 0, at)
        at += int(np.prod(shape[:-1])) if len(shape) > 1 else int(np.prod(shape))
    if at > _MOST:
        raise ModelError(f"{folder} has {at:,} rows of weights, and {_MOST:,} can be told apart")
    stand_in = copy.copy(checkpoint)
    stand_in.tensors = numbered
    found = {}
    keys, firsts = list(starts), np.array(list(starts.values()))
    for planned in read_architecture(stand_in).tensors():
        if planned.name not in names:
            continue
        parts = list(planned.read())
        if any(part.ndim != 2 or (part != part[:, :1]).any() for part in parts):
            continue
        numbers = np.concatenate([part[:, 0] for part in parts]).astype(np.int64)
        n_of_one = planned.shape[-2]
        which = np.searchsorted(firsts, numbers, side="right") - 1
        found[planned.name] = tuple(
            Origin(keys[i], numbers[which == i] - firsts[i], np.flatnonzero(which == i) // n_of_one)
            for i in np.unique(which)
        )
    return found
