"""What is read from safetensors against torch: every type, fp8 with scales of blocks, fused experts, and shards."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deepdistill.errors import ArtifactError, ModelError
from deepdistill.localrun.gguf.header import read_gguf
from deepdistill.quantize.convert.checkpoint import Checkpoint
from deepdistill.quantize.convert.writer import plan, write


def to_fp8(folder: Path, block: tuple[int, int]) -> dict[str, Any]:
    """Turn a checkpoint's matrices into fp8 with scales; return what they stand for."""
    torch = pytest.importorskip("torch")
    load_file = pytest.importorskip("safetensors.torch").load_file
    save_file = pytest.importorskip("safetensors.torch").save_file
    path = folder / "model.safetensors"
    tensors, meaning = {}, {}
    for name, weight in load_file(path).items():
        if weight.ndim < 2 or "layers" not in name:
            tensors[name] = meaning[name] = weight
            continue
        rows, columns = -(-weight.shape[0] // block[0]), -(-weight.shape[1] // block[1])
        scale = 0.01 + torch.rand(rows, columns, generator=torch.Generator().manual_seed(1))
        wide = scale.repeat_interleave(block[0], 0)[: weight.shape[0]]
        wide = wide.repeat_interleave(block[1], 1)[:, : weight.shape[1]]
        tensors[name] = (weight.float() / wide).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale
        meaning[name] = tensors[name].float() * wide
    save_file(tensors, path)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(block)}
    (folder / "config.json").write_text(json.dumps(config))
    return meaning


def test_fp8_blocks_are_what_their_scales_make_them(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_checkpoint("deepseek3")
    meaning = to_fp8(folder, (24, 40))  # neither divides the matrices
    checkpoint = Checkpoint(folder)
    assert set(checkpoint.tensors) == set(meaning)
    for name, weight in checkpoint.tensors.items():
        parts = [weight.rows(slice(i, i + 17)) for i in range(0, weight.shape[0], 17)]
        np.testing.assert_array_equal(np.concatenate(parts), meaning[name].float().numpy())
    write(plan(folder, "F32"), tmp_path / "out.gguf", n_threads=1)
    there = read_gguf(tmp_path / "out.gguf").tensors["blk.1.ffn_up_exps.weight"]
    data = np.fromfile(tmp_path / "out.gguf", np.float32, there.n_bytes // 4, offset=there.offset)
    expected = np.stack([meaning[f"model.layers.1.mlp.experts.{i}.up_proj.weight"].numpy() for i in range(4)])
    np.testing.assert_array_equal(data.reshape(there.shape), expected)


def test_other_quantizations_are_refused(make_checkpoint: Callable[..., Path]) -> None:
    folder = make_checkpoint("qwen2")
    to_fp8(folder, (32, 32))
    config = json.loads((folder / "config.json").read_text())
    for quantization, code, named in (
        ({"quant_method": "fp8"}, "already-quantized", "fp8"),
        ({"quant_method": "awq", "weight_block_size": [32, 32]}, "already-quantized", "awq"),
        (None, "scales-missing", "F8_E4M3"),
    ):
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
        with pytest.raises(ModelError) as caught:
            Checkpoint(folder)
        assert caught.value.code == code
        assert named in caught.value.message
    wrong = {"quant_method": "fp8", "weight_block_size": [16, 32]}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": wrong}))
    with pytest.raises(ArtifactError, check=lambda error: error.code == "tensor-mismatch"):
        Checkpoint(folder)


@pytest.mark.parametrize("arch", ["qwen3moe", "deepseek3"])
def test_fused_experts_make_the_same_file(make_checkpoint: Callable[..., Path], tmp_path: Path, arch: str) -> None:
    """transformers holds a layer's experts in two tensors; both ways of storing them become the same."""
    torch = pytest.importorskip("torch")
    load_file = pytest.importorskip("safetensors.torch").load_file
    save_file = pytest.importorskip("safetensors.torch").save_file
    folder = make_checkpoint(arch)
    write(plan(folder, "Q8_0"), tmp_path / "single.gguf", n_threads=1)
    tensors = load_file(folder / "model.safetensors")
    layers = {name.split(".mlp.")[0] for name in tensors if ".experts." in name}
    for layer in layers:
        parts = {
            part: torch.stack([tensors.pop(f"{layer}.mlp.experts.{i}.{part}_proj.weight") for i in range(4)])
            for part in ("gate", "up", "down")
        }
        tensors[f"{layer}.mlp.experts.gate_up_proj"] = torch.cat([parts["gate"], parts["up"]], 1).contiguous()
        tensors[f"{layer}.mlp.experts.down_proj"] = parts["down"]
    save_file(tensors, folder / "model.safetensors")
    write(plan(folder, "Q8_0"), tmp_path / "fused.gguf", n_threads=1)
    assert (tmp_path / "fused.gguf").read_bytes() == (tmp_path / "single.gguf").read_bytes()
    save_file(
        tensors | {"model.layers.9.mlp.experts.0.up_proj.weight": torch.zeros(2, 2)}, folder / "model.safetensors"
    )
    if arch == "qwen3moe":
        with pytest.raises(ModelError, check=lambda error: "model.layers.9" in error.message):
            plan(folder, "Q8_0")
    else:  # it would predict further ahead, and is left out
        assert plan(folder, "Q8_0").tensors


def test_a_stack_larger_than_a_part_is_weighted_by_expert(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_checkpoint("qwen3moe", hidden_size=256)
    name = "blk.0.ffn_up_exps.weight"
    weights = np.random.default_rng(0).random((4, 256), np.float32)
    files = []
    for size in (1 << 22, 1024):  # a whole expert, and four rows
        files.append(tmp_path / f"{size}.gguf")
        write(plan(folder, "Q4_K_M", importance={name: weights}), files[-1], n_threads=2, part_size=size)
    assert files[0].read_bytes() == files[1].read_bytes()
    write(plan(folder, "Q4_K_M", importance={name: weights[::-1].copy()}), files[0], n_threads=2)
    assert files[0].read_bytes() != files[1].read_bytes()
