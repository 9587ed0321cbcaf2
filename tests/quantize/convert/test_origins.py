"""Rows are found wherever an architecture puts them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from deepdistill.quantize.convert.origins import origins
from deepdistill.quantize.convert.writer import plan


@pytest.mark.parametrize("arch", ["llama", "qwen3moe"])
def test_every_row_is_found_where_it_came_from(make_checkpoint: Callable[..., Path], arch: str) -> None:
    folder = make_checkpoint(arch)
    weights = load_file(folder / "model.safetensors")
    matrices = {one.tensor.name: one.tensor for one in plan(folder, "F32").tensors if len(one.tensor.shape) > 1}
    found = origins(folder, set(matrices), {name: weight.shape for name, weight in weights.items()})
    assert found.keys() == matrices.keys()
    moved = 0
    for name, sources in found.items():
        rows = np.concatenate(list(matrices[name].read()))
        n_of_one, n = matrices[name].shape[-2], 0
        for source in sources:
            flat = weights[source.weight].reshape(-1, rows.shape[1])
            for row, matrix in zip(source.rows, source.matrix, strict=True):
                at = np.flatnonzero((rows == flat[row]).all(axis=1))
                assert matrix in at // n_of_one
                moved += row not in at
                n += 1
        assert n == len(rows)
    assert moved > 0, "q and k rows, or experts, change places"


def test_rows_that_are_mixed_are_left_out(make_checkpoint: Callable[..., Path]) -> None:
    folder = make_checkpoint("deepseek3")
    shapes = {name: weight.shape for name, weight in load_file(folder / "model.safetensors").items()}
    found = origins(folder, {"blk.0.attn_k_b.weight", "blk.0.attn_v_b.weight"}, shapes)
    assert set(found) == {"blk.0.attn_v_b.weight"}
