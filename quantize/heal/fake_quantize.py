"""A model's parameters under the types of a file: which rows are quantized how, and what that changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Type

from ...localrun.gguf import ggml
from ...localrun.gguf.ggml import dequantize_rows
from ..convert.origins import Origin
from ..convert.writer import Importance, Types

if TYPE_CHECKING:
    import torch

_STABLE_ROWS = 64  # of each tensor, to tell whether quantizing again changes anything


class Quantizer:
    """Knows for every parameter which of its rows are quantized how, and what that changes."""

    def __init__(
        self, model: Any, sources: Mapping[str, Sequence[Origin]], types: Types, importance: Importance, n_threads: int
    ) -> None:
        """Take the rows that each tensor has of each parameter."""
        self._parameters = dict(model.named_parameters())
        self._parts: list[tuple[str, npt.NDArray[np.int64], Type, npt.NDArray[np.float32] | None]] = []
        for name, found in sources.items():
            weights = importance.get(name)
            for origin in found:
                for matrix in np.unique(origin.matrix):
                    columns = weights[matrix] if weights is not None and weights.ndim == 2 else weights
                    self._parts.append((origin.weight, origin.rows[origin.matrix == matrix], types[name], columns))
        self._n_threads = n_threads
        self.names = sorted({name for name, *_ in self._parts})

    def changes(self) -> dict[str, torch.Tensor]:
        """Return what quantizing changes of each parameter: as they are under their types, less what they are."""
        import torch

        found = {name: torch.zeros_like(self._parameters[name], requires_grad=False) for name in self.names}
        with ThreadPoolExecutor(self._n_threads) as pool:
            for name, rows, type_, columns in self._parts:
                weight = self._rows(name)
                plain = np.ascontiguousarray(weight[rows])
                data = ggml.quantize_rows(plain, type_, imatrix=columns, pool=pool)
                change = torch.from_numpy(dequantize_rows(data, type_, plain.shape[1]) - plain)
                flat = found[name].view(-1, plain.shape[1])
                flat[torch.from_numpy(rows).to(flat.device)] = change.to(flat)
        return found

    def stability(self) -> float:
        """Return the share of sampled rows whose blocks are the same when their values are quantized again."""
        n_same = n = 0
        for name, rows, type_, columns in self._parts:
            some = rows[:: max(1, len(rows) // _STABLE_ROWS)]
            plain = np.ascontiguousarray(self._rows(name)[some])
            once = ggml.quantize_rows(plain, type_, imatrix=columns)
            values = dequantize_rows(once, type_, plain.shape[1])
            again = dequantize_rows(ggml.quantize_rows(values, type_, imatrix=columns), type_, plain.shape[1])
            n_same += int(np.isclose(again, values, rtol=1e-3, atol=1e-8).all(axis=1).sum())
            n += len(some)
        return n_same / max(n, 1)

    def _rows(self, name: str) -> npt.NDArray[np.float32]:
        weight = self._parameters[name].detach()
        return np.asarray(weight.reshape(-1, weight.shape[-1]).float().cpu().numpy(), np.float32)
