"""Types and bytes of every tensor against llama.cpp's own quantizer, run on our F32 file."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp
import pytest

from deepdistill.errors import UsageError
from deepdistill.localrun.header import read_gguf
from deepdistill.quantize import ftypes
from deepdistill.quantize.ftypes import FTYPES, Shape, check_ftype, choose
from deepdistill.quantize.quantize import quantize

MODELS: dict[str, dict[str, Any]] = {
    # 16 layers: an eighth is two, a sixteenth one, so that every rule about early layers is met
    "whole blocks, 4 queries a KV head": {
        "hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 8, "num_key_value_heads": 2,
        "num_hidden_layers": 16,
    },
    "rows of 192, tied": {
        "hidden_size": 192, "intermediate_size": 256, "num_attention_heads": 6, "num_key_value_heads": 3,
        "num_hidden_layers": 9, "tie_word_embeddings": True, "arch": "qwen2",
    },
    "rows of 72, which nothing divides": {
        "hidden_size": 72, "intermediate_size": 288, "num_attention_heads": 2, "num_key_value_heads": 2,
        "num_hidden_layers": 2,
    },
}  # fmt: skip
QUANTIZED = [name for name in FTYPES if name != "F32"]


@pytest.fixture(scope="module", params=list(MODELS))
def checkpoint_and_f32(
    request: pytest.FixtureRequest, make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    folder = make_checkpoint(**MODELS[request.param])
    path = tmp_path_factory.mktemp("f32") / "f32.gguf"
    quantize(folder, path, "F32")
    return folder, path


@llama_cpp.llama_log_callback
def _ignore(_level: int, _text: bytes, _data: Any) -> None:
    pass


def quantize_by_llama_cpp(source: Path, out: Path, ftype: str) -> None:
    llama_cpp.llama_log_set(_ignore, ctypes.c_void_p(0))
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = int(FTYPES[ftype][0]), 1
    assert llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(out), ctypes.byref(params)) == 0


@pytest.mark.parametrize("ftype", QUANTIZED)
def test_every_tensor_is_llama_cpps_byte_for_byte(
    checkpoint_and_f32: tuple[Path, Path], tmp_path: Path, ftype: str
) -> None:
    folder, f32 = checkpoint_and_f32
    quantize_by_llama_cpp(f32, tmp_path / "theirs.gguf", ftype)
    report = quantize(folder, tmp_path / "ours.gguf", ftype)
    ours, theirs = read_gguf(tmp_path / "ours.gguf"), read_gguf(tmp_path / "theirs.gguf")
    assert {n: t.type.name for n, t in ours.tensors.items()} == {n: t.type.name for n, t in theirs.tensors.items()}
    assert report.tensors == {n: t.type.name for n, t in theirs.tensors.items()}
    ours_data, theirs_data = (tmp_path / "ours.gguf").read_bytes(), (tmp_path / "theirs.gguf").read_bytes()
    for name, tensor in ours.tensors.items():
        there = theirs.tensors[name]
        assert tensor.shape == there.shape
        mine = ours_data[tensor.offset : tensor.offset + tensor.n_bytes]
        assert mine == theirs_data[there.offset : there.offset + there.n_bytes], name
    assert ours.metadata["general.file_type"] == theirs.metadata["general.file_type"]


def test_a_70b_gives_its_few_value_heads_more_bits() -> None:
    large = Shape("llama", 80, 64, 8, tied=False)
    name, shape = "blk.11.attn_v.weight", (1024, 8192)  # a layer that gets no other favour
    assert choose("Q4_K_M", name, shape, large)[1].name == "Q5_K"
    assert choose("Q4_K_M", name, shape, Shape("llama", 80, 64, 64, tied=False))[1].name == "Q4_K"


def test_norms_and_biases_stay_f32() -> None:
    model = Shape("qwen3", 4, 4, 2, tied=False)
    for ftype in FTYPES:
        assert choose(ftype, "blk.0.attn_q_norm.weight", (256,), model) == (ftypes.Type.F32, ftypes.Type.F32)
        assert choose(ftype, "blk.0.attn_q.bias", (256,), model) == (ftypes.Type.F32, ftypes.Type.F32)


def test_types_are_named_in_any_case_and_others_refused() -> None:
    assert check_ftype("q4_k_m") == "Q4_K_M"
    with pytest.raises(UsageError, match="importance matrix"):
        check_ftype("IQ2_XS")
    with pytest.raises(UsageError, match="no type 'Q9'") as caught:
        check_ftype("Q9")
    assert "Q4_K_M" in caught.value.hint
