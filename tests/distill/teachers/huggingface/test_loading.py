"""Every way in which a model folder can be wrong, and where weights go."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from deepdistill.distill.teachers import open_teacher
from deepdistill.distill.teachers.huggingface import loading
from deepdistill.distill.teachers.huggingface.loading import device_map_for, weights_hash
from deepdistill.errors import ModelError


def broken(source: Path, target: Path, name: str, content: bytes | None) -> Path:
    """Copy a model folder with one file replaced, or removed."""
    shutil.copytree(source, target)
    (target / name).unlink()
    if content is not None:
        (target / name).write_bytes(content)
    return target


def test_bad_folders_give_one_line_and_a_hint(folders: dict[str, Path], tmp_path: Path) -> None:
    llama = folders["llama"]
    config = json.loads((llama / "config.json").read_text())
    unknown = json.dumps(config | {"model_type": "warp_drive", "architectures": ["WarpDriveForCausalLM"]}).encode()
    deeper = json.dumps(config | {"num_hidden_layers": 3, "layer_types": None}).encode()
    weights = (llama / "model.safetensors").read_bytes()
    cases = [
        ("config.json", None, "model-incomplete"),
        ("tokenizer.json", None, "model-incomplete"),
        ("tokenizer.json", b"{", "model-unloadable"),
        ("model.safetensors", None, "model-incomplete"),
        ("model.safetensors", weights[: len(weights) // 2], "model-corrupt"),
        ("model.safetensors", b"", "model-corrupt"),
        ("config.json", unknown, "architecture-unknown"),
        ("config.json", b"{", "model-unloadable"),
        ("config.json", deeper, "model-incomplete"),
    ]
    for i, (name, content, expected) in enumerate(cases):
        folder = broken(llama, tmp_path / str(i), name, content)
        with pytest.raises(ModelError) as caught:
            open_teacher(str(folder), device="cpu")
        assert caught.value.code == expected, (name, content and content[:20], caught.value.message)
        assert str(folder) in caught.value.message
        assert "\n" not in caught.value.message


def test_weights_go_on_one_gpu_or_over_all_and_never_half_on_the_cpu() -> None:
    gib = 2**30
    assert device_map_for(10 * gib, {0: 20 * gib, 1: 70 * gib}) == {"": 1}
    assert device_map_for(10 * gib, {3: 20 * gib}) == {"": 3}
    assert device_map_for(100 * gib, {0: 70 * gib, 1: 70 * gib}) == "auto"
    for n_bytes, free in ((100 * gib, {0: 70 * gib}), (140 * gib, {0: 70 * gib, 1: 70 * gib})):
        with pytest.raises(ModelError, check=lambda error: error.code == "model-too-large"):
            device_map_for(n_bytes, free)


def test_weights_are_loaded_straight_into_their_place(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on CUDA, with the CPU in the GPU's place: the size is known before the weights are read."""
    sizes = []

    def place(n_bytes: int, free: dict[int, int]) -> dict[str, str]:
        sizes.append((n_bytes, free))
        return {"": "cpu"}

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (index + 5, 99))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(loading, "device_map_for", place)
    model = loading.load_model(folders["deepseek_v3"], torch.device("cuda"))
    plain = loading.load_model(folders["deepseek_v3"], torch.device("cpu"))
    assert sizes == [(4 * plain.num_parameters(), {0: 5, 1: 6})]
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    loading.load_model(folders["llama"], torch.device("cuda:1"))
    assert sizes[1][1] == {1: 6}


def test_the_revision_is_that_of_the_weights(folders: dict[str, Path], tmp_path: Path) -> None:
    copy = shutil.copytree(folders["llama"], tmp_path / "copy")
    assert weights_hash(copy) == weights_hash(folders["llama"])
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-5] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    assert weights_hash(copy) != weights_hash(folders["llama"])
