"""The bytes of a GGUF tensor back to float rows, by ggml's own code: every type that it can quantize to."""

from __future__ import annotations

import ctypes

import numpy as np
import numpy.typing as npt

from ...errors import ModelError
from . import GGMLQuantizationType
from .ggml import _library, block_size, row_size, type_name

_PLAIN = {GGMLQuantizationType.F32: "<f4", GGMLQuantizationType.F16: "<f2", GGMLQuantizationType.F64: "<f8"}


def dequantize_rows(
    data: npt.NDArray[np.uint8], type_: GGMLQuantizationType, n_per_row: int
) -> npt.NDArray[np.float32]:
    """Return `[n_rows, n_per_row]` of `[n_rows, row bytes]`.

    Raises:
        ModelError: this ggml has no such function.
        ValueError: the bytes are no whole rows.
    """
    if data.ndim != 2 or data.dtype != np.uint8 or data.shape[1] != row_size(type_, n_per_row):
        raise ValueError(f"{data.dtype} {list(data.shape)} holds no rows of {n_per_row} {type_.name}")
    data = np.ascontiguousarray(data)
    if type_ in _PLAIN:
        return data.view(_PLAIN[type_]).astype(np.float32)
    if type_ == GGMLQuantizationType.BF16:
        return (data.view("<u2").astype(np.uint32) << 16).view(np.float32)
    assert n_per_row % block_size(type_) == 0
    try:
        function = getattr(_library(), f"dequantize_row_{type_name(type_)}")
    except AttributeError as error:
        raise ModelError(f"the installed ggml cannot dequantize {type_.name}") from error
    function.restype, function.argtypes = None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    rows = np.empty((len(data), n_per_row), np.float32)
    function(data.ctypes.data, rows.ctypes.data, rows.size)
    return rows
