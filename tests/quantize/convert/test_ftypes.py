"""Types and bytes of every tensor against llama.cpp's own quantizer, run on our F32 file."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from deepdistill.errors import UsageError
from deepdistill.localrun.engine.library import keep_log
from deepdistill.localrun.gguf.header import read_gguf
from deepdistill.quantize.convert import ftypes
from deepdistill.quantize.convert.ftypes import FTYPES, NEED_IMATRIX, Shape, assign, check_ftype
from deepdistill.quantize.convert.writer import plan, write
from deepdistill.quantize.release import quantize

# isort: split
import llama_cpp

MODELS: dict[str, dict[str, Any]] = {
    # 16 layers: an eighth is two, a sixteenth one, so that every rule about early layers is met
    "whole blocks, 4 queries a KV head": {
        "hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 8, "num_key_value_heads": 2,
        "num_hidden_layers": 16,
    },
    "rows of 192, tied": {
        "hidden_size": 192, "intermediate_size": 192, "num_attention_heads": 6, "num_key_value_heads": 3,
        "num_hidden_layers": 9, "tie_word_embeddings": True, "arch": "qwen2",
    },
    "rows of 72, which nothing divides": {
        "hidden_size": 72, "intermediate_size": 288, "num_attention_heads": 2, "num_key_value_heads": 2,
        "num_hidden_layers": 2,
    },
    "8 experts": {
        "arch": "qwen3moe", "hidden_size": 256, "moe_intermediate_size": 32, "num_hidden_layers": 8,
        "num_experts": 8, "head_dim": 64,
    },
    "4 experts, latent attention": {
        "arch": "deepseek3", "num_hidden_layers": 9, "moe_intermediate_size": 256, "hidden_size": 32,
    },
}  # fmt: skip
QUANTIZED = [name for name in FTYPES if name != "F32"]
Checked = tuple[Path, Path, dict[str, np.ndarray]]


@pytest.fixture(scope="module", params=list(MODELS))
def checkpoint_and_f32(
    request: pytest.FixtureRequest, make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Checked:
    """A checkpoint, its F32 file, and an importance matrix of every matrix but the embeddings."""
    folder = make_checkpoint(**MODELS[request.param])
    path = tmp_path_factory.mktemp("f32") / "f32.gguf"
    quantize(folder, path, ftype="F32")
    rng = np.random.default_rng(3)
    importance = {
        name: rng.gamma(0.7, size=tensor.shape[:1] + tensor.shape[-1:] if len(tensor.shape) == 3 else tensor.shape[-1:])
        for name, tensor in read_gguf(path).tensors.items()
        if len(tensor.shape) > 1 and name.startswith("blk.")
    }
    return folder, path, {name: weights.astype(np.float32) for name, weights in importance.items()}


def types_of_llama_cpp(
    requantize: ModuleType, source: Path, ftype: str, importance: dict[str, np.ndarray] | None
) -> dict[str, str]:
    """Return every tensor's type as llama.cpp plans a file and logs it, without quantizing."""
    said: list[bytes] = []
    kept = llama_cpp.llama_log_callback(lambda _level, text, _data: said.append(text))
    room, params = requantize.default_params()
    params.ftype, params.dry_run = int(FTYPES[ftype][0]), True
    alive: list[Any] = []
    if importance:
        params.imatrix = requantize.importance_array(importance, alive)
    pointer = ctypes.cast(ctypes.byref(room), ctypes.POINTER(llama_cpp.llama_model_quantize_params))
    llama_cpp.llama_log_set(kept, ctypes.c_void_p(0))
    try:
        assert llama_cpp.llama_model_quantize(os.fsencode(source), b"", pointer) == 0
    finally:
        llama_cpp.llama_log_set(keep_log, ctypes.c_void_p(0))
    lines = b"".join(said).decode()
    found = re.findall(r"\] (\S+) +- \[.*?\], type = +(\w+), size = [^(\n]*(?:\((\w+)\))?", lines)
    return {name: (new or old).upper() for name, old, new in found}


@pytest.mark.parametrize("importance", ["alone", "with an importance matrix"])
def test_every_tensors_type_is_llama_cpps(requantize: ModuleType, checkpoint_and_f32: Checked, importance: str) -> None:
    folder, f32, weights = checkpoint_and_f32
    given = None if importance == "alone" else weights
    for ftype in QUANTIZED:
        if given is None and ftype in NEED_IMATRIX:
            with pytest.raises(UsageError, check=lambda error: error.code == "needs-imatrix"):
                quantize(folder, ftype=ftype)
            continue
        types = types_of_llama_cpp(requantize, f32, ftype, given)
        ours = {t.tensor.name: t.got.name for t in plan(folder, ftype, importance=given).tensors}
        assert ours == types, ftype


def compare_bytes(requantize: ModuleType, checked: Checked, tmp_path: Path, ftype: str, with_importance: bool) -> None:
    folder, f32, weights = checked
    given = weights if with_importance else None
    requantize.requantize(f32, tmp_path / "theirs.gguf", ftype=int(FTYPES[ftype][0]), importance=given, n_threads=1)
    write(plan(folder, ftype, importance=given), tmp_path / "ours.gguf", n_threads=1)
    ours, theirs = read_gguf(tmp_path / "ours.gguf"), read_gguf(tmp_path / "theirs.gguf")
    assert {n: t.type.name for n, t in ours.tensors.items()} == {n: t.type.name for n, t in theirs.tensors.items()}
    ours_data, theirs_data = (tmp_path / "ours.gguf").read_bytes(), (tmp_path / "theirs.gguf").read_bytes()
    for name, tensor in ours.tensors.items():
        there = theirs.tensors[name]
        assert tensor.shape == there.shape
        mine = ours_data[tensor.offset : tensor.offset + tensor.n_bytes]
        assert mine == theirs_data[there.offset : there.offset + there.n_bytes], name
    assert ours.metadata["general.file_type"] == theirs.metadata["general.file_type"]


@pytest.mark.parametrize("ftype", ["Q8_0", "F16", "Q3_K_M"])
def test_every_tensor_is_llama_cpps_byte_for_byte(
    requantize: ModuleType, checkpoint_and_f32: Checked, tmp_path: Path, ftype: str
) -> None:
    if ftype == "Q3_K_M" and checkpoint_and_f32[1].stat().st_size > 20_000_000:
        pytest.skip("among the slow ones below")
    compare_bytes(requantize, checkpoint_and_f32, tmp_path, ftype, ftype == "Q3_K_M")


@pytest.mark.slow
@pytest.mark.parametrize("with_importance", [False, True])
@pytest.mark.parametrize("ftype", QUANTIZED)
def test_every_type_is_llama_cpps_byte_for_byte(
    requantize: ModuleType, checkpoint_and_f32: Checked, tmp_path: Path, ftype: str, with_importance: bool
) -> None:
    if (not with_importance and ftype in NEED_IMATRIX) or (with_importance and ftype in ftypes.UNQUANTIZED):
        pytest.skip("there is no such file")
    compare_bytes(requantize, checkpoint_and_f32, tmp_path, ftype, with_importance)


def test_a_70b_gives_its_few_value_heads_more_bits() -> None:
    name, shape = "blk.11.attn_v.weight", (1024, 8192)  # a layer that gets no other favour
    tensors = {f"blk.{i}.attn_v.weight": shape for i in range(80)}
    large, wide = Shape("llama", 80, 64, 8, tied=False), Shape("llama", 80, 64, 64, tied=False)
    assert assign("Q4_K_M", tensors, model=large)[name][1].name == "Q5_K"
    assert assign("Q4_K_M", tensors, model=wide)[name][1].name == "Q4_K"


def test_norms_biases_and_routers_stay_f32() -> None:
    model = Shape("qwen3moe", 4, 4, 2, tied=False, n_experts=4)
    names = {"blk.0.attn_q_norm.weight": (256,), "blk.0.attn_q.bias": (256,), "blk.0.ffn_gate_inp.weight": (8, 256)}
    for ftype in FTYPES:
        assert set(assign(ftype, names, model=model, has_imatrix=True).values()) == {(ftypes.Type.F32, ftypes.Type.F32)}


def test_types_are_named_in_any_case_and_others_refused() -> None:
    assert check_ftype("q4_k_m") == "Q4_K_M"
    assert check_ftype("iq2_xs", has_imatrix=True) == "IQ2_XS"
    with pytest.raises(UsageError, check=lambda error: error.code == "needs-imatrix") as caught:
        check_ftype("IQ2_XS")
    assert "IQ3_S" in caught.value.hint
    assert "IQ3_XXS" not in caught.value.hint
    with pytest.raises(UsageError, check=lambda error: error.code == "no-such-type") as caught:
        check_ftype("Q9")
    assert "Q4_K_M" in caught.value.hint
