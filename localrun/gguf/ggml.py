"""ggml's own quantizers, through ctypes: float rows to the bytes of a GGUF tensor, and back.

The library is the one that the installed llama-cpp-python brings, so a file made here holds byte for byte what
llama.cpp's quantizer would write. ctypes releases the GIL: rows are quantized on all cores by plain threads.
ggml aborts the whole process on a bad argument, so every argument is checked before a call.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import sys
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import ModelError
from . import GGML_QUANT_SIZES, GGMLQuantizationType

_HINT = (
    "pip install llama-cpp-python (needs a C++ compiler), or without one: pip install llama-cpp-python "
    "--extra-index-url https://abetlen.github.io/llama-cpp-python/whl/cpu"
)
NEED_IMATRIX = frozenset(
    {
        GGMLQuantizationType.IQ1_S,
        GGMLQuantizationType.IQ1_M,
        GGMLQuantizationType.IQ2_XXS,
        GGMLQuantizationType.IQ2_XS,
        GGMLQuantizationType.IQ2_S,
        GGMLQuantizationType.IQ3_XXS,
    }
)
"""Types that are useless, or refused, without an importance matrix."""
_PLAIN = {GGMLQuantizationType.F32: "<f4", GGMLQuantizationType.F16: "<f2", GGMLQuantizationType.F64: "<f8"}
# The types that we write: their numbers and sizes are checked against the library's once.
_WRITTEN = (
    "F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K", "Q4_K",
    "Q3_K", "Q2_K", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "IQ4_NL",
    "IQ4_XS", "IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS",
)  # fmt: skip


_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {  # name: (result, arguments)
    "ggml_blck_size": (ctypes.c_int64, [ctypes.c_int]),
    "ggml_type_size": (ctypes.c_size_t, [ctypes.c_int]),
    "ggml_type_name": (ctypes.c_char_p, [ctypes.c_int]),
    "ggml_quantize_chunk": (
        ctypes.c_size_t,
        [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p],
    ),
}


@functools.cache
def ggml_library() -> ctypes.CDLL:
    """Load libggml-base and declare what is called, after checking that its types are those that `gguf` names.

    Raises:
        ModelError: code "llama-cpp-broken": it is missing, or numbers or sizes its types differently.
    """
    path = _library_path()
    try:
        library = ctypes.CDLL(str(path))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise _broken(f"the ggml of llama-cpp-python cannot be used: {error}") from error
    for type_ in (GGMLQuantizationType[name] for name in _WRITTEN):
        found = (library.ggml_type_name(int(type_)) or b"?").decode()
        if found.upper() != type_.name:
            raise _broken(f"this llama-cpp-python numbers ggml's types differently: {type_.name} is {found} in it")
        if (library.ggml_blck_size(int(type_)), library.ggml_type_size(int(type_))) != GGML_QUANT_SIZES[type_]:
            raise _broken(f"this llama-cpp-python has blocks of another size for {type_.name}")
    return library


def _broken(message: str) -> ModelError:
    return ModelError(message, _HINT, code="llama-cpp-broken")


def _library_path() -> Path:
    name = {"win32": "ggml-base.dll", "darwin": "libggml-base.dylib"}.get(sys.platform, "libggml-base.so")
    override = os.environ.get("LLAMA_CPP_LIB_PATH")  # llama-cpp-python reads it too
    spec = importlib.util.find_spec("llama_cpp")
    if not override and (spec is None or not spec.origin):
        raise _broken("llama-cpp-python is not installed")
    folder = Path(override) if override else Path(str(spec.origin if spec else "")).parent / "lib"
    path = folder / name
    if not path.is_file():
        raise _broken(f"llama-cpp-python has no {name} in {folder}")
    return path


def block_size(type_: GGMLQuantizationType) -> int:
    """Return how many elements one block holds: a row must be a multiple of it."""
    return GGML_QUANT_SIZES[type_][0]


def row_size(type_: GGMLQuantizationType, n_per_row: int) -> int:
    """Return the bytes of one row.

    Raises:
        ValueError: a row of this length has no whole number of blocks.
    """
    block, block_bytes = GGML_QUANT_SIZES[type_]
    if n_per_row <= 0 or n_per_row % block:
        raise ValueError(f"a row of {n_per_row} is not a multiple of {type_.name}'s block of {block}")
    return n_per_row // block * block_bytes


def quantize_rows(
    data: npt.NDArray[np.float32],
    type_: GGMLQuantizationType,
    *,
    imatrix: npt.NDArray[np.float32] | None = None,
    pool: Executor | None = None,
    n_chunk: int = 1 << 18,
) -> npt.NDArray[np.uint8]:
    """Return `[n_rows, row bytes]` of `[n_rows, n_per_row]`, with a weight per column `[n_per_row]` if there is one.

    The bytes do not depend on the pool: rows are quantized one by one. A task takes n_chunk elements: enough to hide
    Python's overhead, few enough to keep all cores busy.

    Raises:
        ValueError: the array is not 2-D float32 with whole blocks, not finite, or the type needs an imatrix.
    """
    if data.ndim != 2 or data.dtype != np.float32:
        raise ValueError(f"quantize_rows takes 2-D float32, not {data.ndim}-D {data.dtype}")
    n_rows, n_per_row = data.shape
    if imatrix is not None and (imatrix.shape != (n_per_row,) or imatrix.dtype != np.float32):
        raise ValueError(f"the imatrix must be float32 [{n_per_row}], not {imatrix.dtype} {list(imatrix.shape)}")
    if imatrix is None and type_ in NEED_IMATRIX:
        raise ValueError(f"{type_.name} needs an importance matrix")
    out = np.empty((n_rows, row_size(type_, n_per_row)), dtype=np.uint8)
    data = np.ascontiguousarray(data)
    weights = None if imatrix is None else np.ascontiguousarray(imatrix)
    step = max(1, n_chunk // n_per_row)
    starts = range(0, n_rows, step)

    def run(start: int) -> None:
        rows = slice(start, start + step)
        _quantize_into(type_, data[rows], out=out[rows], weights=weights)

    for _ in map(run, starts) if pool is None or len(starts) == 1 else pool.map(run, starts):
        pass
    return out


def _quantize_into(
    type_: GGMLQuantizationType,
    rows: npt.NDArray[np.float32],
    *,
    out: npt.NDArray[np.uint8],
    weights: npt.NDArray[np.float32] | None,
) -> None:
    if not np.isfinite(rows).all():
        raise ValueError("NaN or infinite values")
    pointer = None if weights is None else weights.ctypes.data
    quantize = ggml_library().ggml_quantize_chunk
    n_bytes = quantize(int(type_), rows.ctypes.data, out.ctypes.data, 0, rows.shape[0], rows.shape[1], pointer)
    if n_bytes != out.nbytes:
        raise RuntimeError(f"ggml wrote {n_bytes} bytes of {type_.name} instead of {out.nbytes}")


def dequantize_rows(
    data: npt.NDArray[np.uint8], type_: GGMLQuantizationType, n_per_row: int
) -> npt.NDArray[np.float32]:
    """Return `[n_rows, n_per_row]` of `[n_rows, row bytes]`.

    Raises:
        ModelError: code "type-unsupported".
        ValueError: the bytes are not whole rows.
    """
    if data.ndim != 2 or data.dtype != np.uint8 or data.shape[1] != row_size(type_, n_per_row):
        raise ValueError(f"{data.dtype} {list(data.shape)} does not hold rows of {n_per_row} {type_.name}")
    data = np.ascontiguousarray(data)
    if type_ in _PLAIN:
        return data.view(_PLAIN[type_]).astype(np.float32)
    if type_ == GGMLQuantizationType.BF16:
        return (data.view("<u2").astype(np.uint32) << 16).view(np.float32)
    name = ggml_library().ggml_type_name(int(type_)).decode()
    try:
        function = getattr(ggml_library(), f"dequantize_row_{name}")
    except AttributeError as error:
        raise ModelError(f"the installed ggml cannot dequantize {type_.name}", code="type-unsupported") from error
    function.restype, function.argtypes = None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    rows = np.empty((len(data), n_per_row), np.float32)
    function(data.ctypes.data, rows.ctypes.data, rows.size)
    return rows
