"""Every type of number is read from safetensors as torch reads it, and a broken header is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deepdistill.errors import DeepDistillError
from deepdistill.quantize.convert.safetensors import read_header


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn"])
def test_every_type_is_read_as_torch_reads_it(tmp_path: Path, dtype: str) -> None:
    torch = pytest.importorskip("torch")
    save_file = pytest.importorskip("safetensors.torch").save_file
    values = torch.randn(11, 6, generator=torch.Generator().manual_seed(0)) * 3
    if dtype == "float8_e4m3fn":  # all of its values, NaN included
        values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).reshape(32, 8)
    stored = values.to(getattr(torch, dtype))
    save_file({"first": torch.zeros(3), "a": stored}, tmp_path / "a.safetensors")
    tensor = read_header(tmp_path / "a.safetensors")["a"]
    expected = stored.to(torch.float32).numpy()
    np.testing.assert_array_equal(tensor.rows(), expected)
    np.testing.assert_array_equal(tensor.rows(slice(3, 7)), expected[3:7])
    assert tensor.rows(slice(5, 5)).shape == (0, expected.shape[1])


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"shape": [-2, 3]}, "safetensors-broken"),
        ({"shape": ["2", 3]}, "safetensors-broken"),
        ({"shape": 6}, "safetensors-broken"),
        ({"data_offsets": [-4, 20]}, "safetensors-broken"),
        ({"data_offsets": [0]}, "safetensors-broken"),
        ({"data_offsets": [24, 0]}, "safetensors-broken"),
        ({"data_offsets": [0, 240]}, "safetensors-broken"),
        ({"shape": [1 << 60, 1 << 60]}, "safetensors-broken"),
        ({"dtype": "I32"}, "unsupported-dtype"),
    ],
)
def test_a_broken_header_is_told(tmp_path: Path, change: dict[str, Any], code: str) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]} | change}).encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(24))
    with pytest.raises(DeepDistillError, check=lambda error: error.code == code):
        read_header(tmp_path / "a.safetensors")
