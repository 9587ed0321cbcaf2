"""A model in memory whose weights can be exchanged one by one, to measure how each change affects its logits.

The model is loaded once as F16; a weight is set through ggml's own backend, which works on a GPU too. A measurement
takes one pass over the texts: no file is written, nothing is loaded again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ...errors import ModelError
from ..core.closes import Closes
from ..engine.llama import Context, Model
from ..engine.logprobs import logit_rows
from ..machine.hardware import default_threads
from ..machine.memory import N_BATCH
from .tensors import Pointer, address_of, name_of, scheduler_callback, set_f16


class LogitReader(Closes):
    """A GGUF that is run only for its logits. Close it, or use it as a context manager."""

    def __init__(self, path: Path, *, n_threads: int | None = None, writable: bool = False) -> None:
        """Load the file.

        Raises:
            ArtifactError, ModelError: see `llama.Model` and `llama.Context`.
        """
        self.model = Model(path, writable=writable)
        self._n_threads = n_threads or default_threads()
        try:
            n_ctx = max(N_BATCH, min(self.model.n_ctx_train or 4096, 4096))
            self._context = Context(self.model, n_ctx)
            self._context.set_threads(self._n_threads)
        except BaseException:
            self.model.close()
            raise

    def logit_rows(self, tokens: Sequence[int], start: int = 1) -> Iterator[npt.NDArray[np.float32]]:
        """Yield the logits `[V]` that predict each token from `start`, at least 1, on: views that are overwritten.

        Raises:
            ModelError: code "prompt-too-long".
        """
        return logit_rows(self._context, tokens[:-1], start - 1)

    def close(self) -> None:
        """Free the cache and the weights. More than one call does no harm."""
        self._context.close()
        self.model.close()


class Probe(LogitReader):
    """An F16 GGUF that can be run with other weights."""

    def __init__(self, path: Path, *, n_threads: int | None = None) -> None:
        """Load the file into memory of its own, and find the address of each weight.

        Raises:
            ArtifactError, ModelError: the file cannot be run, or ggml's tensors do not look as they should.
        """
        super().__init__(path, n_threads=n_threads, writable=True)
        self._weights: dict[str, list[Pointer]] = {}
        try:
            self._locate(self._n_threads)
        except BaseException:
            self.close()
            raise

    def _locate(self, n_threads: int) -> None:
        failed: list[BaseException] = []

        def on_node(node: Pointer, _: bool) -> bool:
            for source in node.contents.src[:2]:
                name = name_of(source) if source else ""
                if name.endswith(".weight"):
                    known = self._weights.setdefault(name, [])
                    if all(source.contents.data != other.contents.data for other in known):
                        known.append(address_of(source))
            return False

        with Context(self.model, N_BATCH, n_batch=8, on_eval=scheduler_callback(on_node, failed)) as context:
            context.set_threads(n_threads)
            context.run([0] * 4, 0)
        if failed:
            raise failed[0]

    @property
    def names(self) -> frozenset[str]:
        """The weights that the model computes with."""
        return frozenset(self._weights)

    def set(self, name: str, rows: npt.NDArray[np.float32]) -> None:
        """Set a weight's values, in any shape with as many elements.

        Raises:
            ModelError: code "no-such-weight".
        """
        if name not in self._weights:
            raise ModelError(f"{self.model.path} does not compute with {name}", code="no-such-weight")
        for tensor in self._weights[name]:
            set_f16(tensor, rows)
