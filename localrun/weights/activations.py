"""Sum the squares of what every weight matrix is multiplied with while texts are read: the importance matrix.

ggml's scheduler asks a callback about each node of the graph. We say yes to products with a weight, and are called
again when the other factor, the activations, can be read. We ask for every position's logits: otherwise the last
layer's feed-forward would be computed for the last token alone.

Source: https://github.com/ggml-org/llama.cpp, tools/imatrix/imatrix.cpp. Unlike llama.cpp we also keep a tied
output's activations, under `token_embd.weight`, and count batches of any size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ...errors import ModelError
from ..engine.llama import Context, Model
from ..machine.hardware import default_threads
from ..machine.memory import N_BATCH
from .tensors import Pointer, name_of, op_of, scheduler_callback, values_of


@dataclass
class Squares:
    """One weight's sum of squares of each input column `[n_matrices, n_per_row]`, and how many rows were summed.

    `counts` is `[n_matrices]` for stacked experts, which see only the tokens routed to them, and `[1]` for others.
    """

    sums: npt.NDArray[np.float64]
    counts: npt.NDArray[np.int64]


def collect_squares(
    path: Path,
    texts: Iterable[Sequence[int]],
    *,
    n_threads: int | None = None,
    on_text: Callable[[int], None] = lambda _: None,
) -> dict[str, Squares]:
    """Read texts, each on its own, and return the squares of every matrix's inputs.

    Args:
        path: the GGUF; its activations are those of an unquantized model if its weights are F16, BF16 or F32.
        texts: token ids; a text is cut at the model's trained context.
        n_threads: the machine's cores if not given.
        on_text: called with the number of texts done.

    Raises:
        ArtifactError, ModelError: the file cannot be run, or ggml's tensors do not look as they should.
    """
    found: dict[str, Squares] = {}
    failed: list[BaseException] = []

    def on_node(node: Pointer, is_asked: bool) -> bool:
        if is_asked:
            return _is_product_with_weight(node)
        _add(found, node)
        return True

    with Model(path) as model:
        n_ctx = max(N_BATCH, min(model.n_ctx_train or 4096, 4096))
        with Context(model, n_ctx, on_eval=scheduler_callback(on_node, failed)) as context:
            context.set_threads(n_threads or default_threads())
            for i, tokens in enumerate(texts):
                _read(context, list(tokens)[:n_ctx], failed)
                on_text(i + 1)
    return found


def _read(context: Context, tokens: list[int], failed: list[BaseException]) -> None:
    context.forget(0)
    try:
        context.run(tokens, 0, every=True)
    except ModelError:
        if not failed:
            raise
    if failed:
        raise failed[0]


def _is_product_with_weight(node: Pointer) -> bool:
    op = op_of(node)
    if op == "MUL_MAT_ID":
        return True
    return op == "MUL_MAT" and name_of(node.contents.src[0]).endswith(".weight")


def _add(found: dict[str, Squares], node: Pointer) -> None:
    weight, inputs = node.contents.src[0], values_of(node.contents.src[1])
    n_columns = inputs.shape[-1]
    shape = weight.contents.ne
    squares = inputs.astype(np.float64) ** 2
    if op_of(node) == "MUL_MAT_ID":
        n_matrices = int(shape[2])
        ids = values_of(node.contents.src[2])[0, 0]  # [tokens, used]
        squares = squares[0]  # [tokens, used or 1, n_columns]
        sums, counts = np.zeros((n_matrices, n_columns)), np.zeros(n_matrices, np.int64)
        for slot in range(ids.shape[1]):
            np.add.at(sums, ids[:, slot], squares[:, slot % squares.shape[1]])
            counts += np.bincount(ids[:, slot], minlength=n_matrices)
    else:
        n_matrices = int(shape[2] * shape[3])
        sums = np.zeros((n_matrices, n_columns))
        by_matrix = squares.sum(axis=2)  # [ne3, ne2, n_columns]
        for i3, i2 in np.ndindex(by_matrix.shape[:2]):
            sums[(i3 % shape[3]) * shape[2] + i2 % shape[2]] += by_matrix[i3, i2]
        counts = np.array([int(np.prod(inputs.shape[:-1])) // n_matrices])
    name = name_of(weight)
    before = found.setdefault(name, Squares(np.zeros_like(sums), np.zeros_like(counts)))
    before.sums += sums
    before.counts += counts
