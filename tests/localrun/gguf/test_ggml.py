"""ggml's quantizers against `gguf`'s own numpy ones, and what must not reach C."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from deepdistill.errors import ModelError
from deepdistill.localrun.gguf import ggml

USED = [
    Type.F16, Type.BF16, Type.Q8_0, Type.Q6_K, Type.Q5_K, Type.Q4_K, Type.Q3_K, Type.Q2_K,
    Type.Q5_1, Type.Q5_0, Type.Q4_0, Type.IQ4_XS, Type.IQ4_NL,
]  # fmt: skip


@pytest.fixture
def rows() -> np.ndarray:
    return np.random.default_rng(0).normal(0, 0.7, (37, 512)).astype(np.float32)


@pytest.fixture
def _fresh_library() -> Iterator[None]:
    ggml.ggml_library.cache_clear()
    yield
    ggml.ggml_library.cache_clear()


@pytest.mark.parametrize("type_", USED)
def test_sizes_are_those_of_the_library(type_: Type) -> None:
    library = ggml.ggml_library()
    block = library.ggml_blck_size(int(type_))
    assert ggml.block_size(type_) == block
    assert ggml.row_size(type_, 3 * 256) == 3 * 256 // block * library.ggml_type_size(int(type_))


@pytest.mark.parametrize("type_", [Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q5_0, Type.Q5_1])
def test_bytes_equal_the_numpy_quantizer(rows: np.ndarray, type_: Type) -> None:
    expected = gguf.quants.quantize(rows, type_)
    assert ggml.quantize_rows(rows, type_).tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("type_", "limit"),
    [
        (Type.Q6_K, 0.02),
        (Type.Q5_K, 0.04),
        (Type.Q4_K, 0.08),
        (Type.IQ4_XS, 0.08),
        (Type.Q3_K, 0.16),
        (Type.Q2_K, 0.32),
    ],
)
def test_k_types_come_back_close(rows: np.ndarray, type_: Type, limit: float) -> None:
    back = gguf.quants.dequantize(ggml.quantize_rows(rows, type_), type_)
    error = float(np.linalg.norm(back - rows) / np.linalg.norm(rows))
    assert limit / 3 < error < limit


def test_threads_and_strides_change_no_byte(rows: np.ndarray) -> None:
    expected = ggml.quantize_rows(rows, Type.Q4_K)
    wide = np.concatenate([rows, rows], axis=1)
    with ThreadPoolExecutor(4) as pool:  # many tasks of two rows
        assert (ggml.quantize_rows(rows, Type.Q4_K, pool=pool, n_chunk=1024) == expected).all()
        assert (ggml.quantize_rows(wide[:, 512:], Type.Q4_K, pool=pool, n_chunk=1024) == expected).all()


def test_an_imatrix_protects_the_columns_that_matter(rows: np.ndarray) -> None:
    weights = np.full(512, 0.01, np.float32)
    weights[::7] = 100

    def error(imatrix: np.ndarray | None) -> float:
        back = gguf.quants.dequantize(ggml.quantize_rows(rows, Type.Q2_K, imatrix=imatrix), Type.Q2_K)
        return float(np.square(back - rows)[:, ::7].mean())

    assert error(weights) < 0.8 * error(None)


@pytest.mark.parametrize(
    ("data", "type_", "says"),
    [
        (np.zeros(256, np.float32), Type.Q4_K, "2-D"),
        (np.zeros((2, 256)), Type.Q4_K, "float64"),
        (np.zeros((2, 192), np.float32), Type.Q4_K, "block of 256"),
        (np.zeros((2, 0), np.float32), Type.Q4_K, "block"),
        (np.full((2, 256), np.nan, np.float32), Type.Q4_K, "NaN"),
        (np.full((2, 256), np.inf, np.float32), Type.Q8_0, "infinite"),
        (np.zeros((2, 256), np.float32), Type.IQ2_XXS, "importance matrix"),
    ],
)
def test_what_would_abort_the_process_is_an_exception(data: np.ndarray, type_: Type, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ggml.quantize_rows(data, type_)


def test_an_imatrix_of_the_wrong_length_is_refused(rows: np.ndarray) -> None:
    with pytest.raises(ValueError, match="imatrix"):
        ggml.quantize_rows(rows, Type.Q4_K, imatrix=np.ones(256, np.float32))


@pytest.mark.usefixtures("_fresh_library")
def test_no_library_is_an_error_with_a_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(tmp_path))
    with pytest.raises(ModelError, check=lambda error: error.code == "llama-cpp-broken") as caught:
        ggml.ggml_library()
    assert "pip install llama-cpp-python" in caught.value.hint
