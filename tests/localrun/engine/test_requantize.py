"""llama.cpp's own quantizer: its struct checked before a call, its reasons kept, its options obeyed."""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import ModuleType
from typing import Any

import llama_cpp
import numpy as np
import pytest

from deepdistill.errors import ArtifactError, ModelError
from deepdistill.localrun.gguf import ggml
from deepdistill.localrun.gguf.header import read_gguf

Q4_0, Q8_0, Q5_1 = 2, 7, 7  # the file types, and Q5_1's number as a tensor's type


def test_types_and_importance_are_obeyed(requantize: ModuleType, random_gguf: Path, tmp_path: Path) -> None:
    name = "blk.0.ffn_up.weight"
    source = read_gguf(random_gguf).tensors[name]
    rows = np.fromfile(random_gguf, np.float32, source.n_bytes // 4, offset=source.offset).reshape(source.shape)
    weights = np.random.default_rng(0).random(source.shape[-1], np.float32)
    out = tmp_path / "out.gguf"
    requantize.requantize(
        random_gguf, out, ftype=Q4_0, importance={name: weights}, types={"blk.1.ffn_up.weight": Q5_1}, n_threads=1
    )
    written = read_gguf(out).tensors
    assert written["blk.1.ffn_up.weight"].type.name == "Q5_1"
    assert written["blk.1.ffn_gate.weight"].type.name == "Q4_0"
    data = out.read_bytes()[written[name].offset :][: written[name].n_bytes]
    assert data == ggml.quantize_rows(rows, written[name].type, imatrix=weights).tobytes()
    assert data != ggml.quantize_rows(rows, written[name].type).tobytes()


def test_llama_cpps_reason_is_told(requantize: ModuleType, random_gguf: Path, tmp_path: Path) -> None:
    def told(reason: str) -> Any:
        return pytest.raises(ArtifactError, check=lambda e: e.code == "quantize-failed" and reason in e.message)

    with told("missing.gguf"):
        requantize.requantize(tmp_path / "missing.gguf", tmp_path / "out.gguf", ftype=Q8_0)
    with told("invalid output file type"):
        requantize.requantize(random_gguf, tmp_path / "out.gguf", ftype=9999)
    requantize.requantize(random_gguf, tmp_path / "q4.gguf", ftype=Q4_0)
    with told("requantizing"):
        requantize.requantize(tmp_path / "q4.gguf", tmp_path / "out.gguf", ftype=Q8_0)


@pytest.mark.parametrize("gone", ["ftype", "only_copy", "imatrix"])
def test_bindings_that_lack_a_field_are_refused(
    requantize: ModuleType, monkeypatch: pytest.MonkeyPatch, gone: str
) -> None:
    fields = [field for field in llama_cpp.llama_model_quantize_params._fields_ if field[0] != gone]
    fields += [(gone, ctypes.c_int)]  # it is there, and in the wrong place
    wrong = type("Params", (ctypes.Structure,), {"_fields_": fields})
    monkeypatch.setattr(llama_cpp, "llama_model_quantize_params", wrong)
    with pytest.raises(ModelError, check=lambda error: error.code == "llama-cpp-mismatch"):
        requantize.default_params()
