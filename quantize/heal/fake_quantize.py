"""Fake quantization: a model's parameters as they are under the types of a file, still as floats."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Type

from ...localrun.machine.hardware import default_threads
from ..convert.origins import Origin
from ..convert.writer import TypedTensor, round_trip

if TYPE_CHECKING:
    import torch

_STABLE_ROWS = 64  # of each tensor, to find out if quantizing again changes anything


class Quantizer:
    """A model whose parameters are to be quantized: which rows of each, how, and what that changes."""

    def __init__(self, model: Any, sources: Iterable[tuple[TypedTensor, Sequence[Origin]]]) -> None:
        """Take each tensor of the file with the parameters' rows that it consists of."""
        self.model = model
        self._parameters = dict(model.named_parameters())
        self._parts: list[tuple[str, npt.NDArray[np.int64], Type, npt.NDArray[np.float32] | None]] = []
        for typed, origins in sources:
            weights = typed.importance
            for origin in origins:
                for matrix in np.unique(origin.matrix):
                    columns = weights[matrix] if weights is not None and weights.ndim == 2 else weights
                    self._parts.append((origin.weight, origin.rows[origin.matrix == matrix], typed.got, columns))
        self.names = sorted({name for name, *_ in self._parts})

    def changes(self) -> dict[str, torch.Tensor]:
        """Return for each parameter its quantized values minus its values."""
        import torch

        found = {name: torch.zeros_like(self._parameters[name], requires_grad=False) for name in self.names}
        with ThreadPoolExecutor(default_threads()) as pool:
            for name, rows, type_, columns in self._parts:
                weight = self._rows(name)
                plain = np.ascontiguousarray(weight[rows])
                change = torch.from_numpy(round_trip(plain, type_, weights=columns, pool=pool) - plain)
                flat = found[name].view(-1, plain.shape[1])
                flat[torch.from_numpy(rows).to(flat.device)] = change.to(flat)
        return found

    def stability(self) -> float:
        """Return the share of sampled rows whose blocks stay the same if their values are quantized again."""
        n_same = n = 0
        for name, rows, type_, columns in self._parts:
            sample = rows[:: max(1, len(rows) // _STABLE_ROWS)]
            once = round_trip(np.ascontiguousarray(self._rows(name)[sample]), type_, weights=columns)
            twice = round_trip(once, type_, weights=columns)
            n_same += int(np.isclose(twice, once, rtol=1e-3, atol=1e-8).all(axis=1).sum())
            n += len(sample)
        return n_same / max(n, 1)

    def _rows(self, name: str) -> npt.NDArray[np.float32]:
        weight = self._parameters[name].detach()
        return np.asarray(weight.reshape(-1, weight.shape[-1]).float().cpu().numpy(), np.float32)
