"""Healing: rows are found wherever an architecture puts them, the loss is the divergence, and the file gets nearer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch.nn import functional as F

from deepdistill.quantize.calibration import CalibrationSettings
from deepdistill.quantize.convert import plan
from deepdistill.quantize.heal import divergence
from deepdistill.quantize.inspection import read_own
from deepdistill.quantize.release import release
from deepdistill.quantize.rows import origins
from deepdistill.quantize.settings import ReleaseSettings
from deepdistill.quantize.verify import verify


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


def test_the_loss_is_the_divergence_with_the_rest_in_one_bucket() -> None:
    torch.manual_seed(0)
    teacher, student = (torch.log_softmax(torch.randn(5, 40) * 2, -1) for _ in range(2))
    full = F.kl_div(student, teacher, log_target=True, reduction="batchmean")
    best, top = teacher.topk(40)
    nothing = torch.full((5,), -60.0)
    torch.testing.assert_close(divergence(student, top, best, nothing), full, rtol=1e-4, atol=1e-4)
    best, top = teacher.topk(8)
    rest = torch.log(1 - best.exp().sum(-1))
    bucketed = []
    for row in range(5):
        p = [*best[row].exp().tolist(), float(rest[row].exp())]
        q = student[row, top[row]].exp().tolist()
        q.append(1 - sum(q))
        bucketed.append(sum(a * np.log(a / b) for a, b in zip(p, q, strict=True)))
    assert float(divergence(student, top, best, rest)) == pytest.approx(np.mean(bucketed), rel=1e-4)


def test_a_healed_file_is_nearer_and_holds_the_blocks_that_were_trained(student: Path, tmp_path: Path) -> None:
    traces = tmp_path / "traces.jsonl"
    lines = (
        {"messages": [{"role": "user", "content": f"{i} + 1?"}], "content": str(i + 1), "verdict": "right"}
        | {"reasoning_content": f"{i} + 1 = {i + 1}", "finish_reason": "stop"}
        for i in range(80)
    )
    traces.write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = {"type": "Q4_0", "traces": traces, "calibration": CalibrationSettings(1500, 40, 300)}
    plain = release(student, tmp_path / "plain.gguf", ReleaseSettings(**settings), n_threads=1)  # type: ignore[arg-type]
    healed = release(student, tmp_path / "healed.gguf", ReleaseSettings(heal=30, **settings), n_threads=1)  # type: ignore[arg-type]
    assert plain.fidelity is not None
    assert healed.fidelity is not None
    assert healed.healed is not None
    assert healed.fidelity.kl_mean < 0.7 * plain.fidelity.kl_mean
    assert healed.healed["loss_after"] < healed.healed["loss_before"]
    assert healed.healed["requantized_same"] > 0.95
    assert healed.report.tensors == plain.report.tensors
    assert read_own(tmp_path / "healed.gguf")["source"]["folder"] == f"{student.name}-healed"
    assert verify(tmp_path / "healed.gguf").holds, "the healed checkpoint quantizes to the same blocks again"
