"""Read and set ggml's tensors in memory while llama.cpp computes.

We mirror the struct, and check its size against the installed library before reading anything through it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import ModelError
from ..gguf.ggml import ggml_library

_OBJECT_BYTES = 32  # GGML_OBJECT_SIZE: ggml_tensor_overhead() counts it too
_F32, _F16, _I32 = 0, 1, 26  # ggml_type


class GgmlTensor(ctypes.Structure):
    """`struct ggml_tensor`. `ne` counts elements and `nb` strides in bytes, the fastest dimension first.

    Source: https://github.com/ggml-org/ggml, include/ggml.h.
    """


GgmlTensor._fields_ = [
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * 16),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(GgmlTensor) * 10),
    ("view_src", ctypes.c_void_p),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
    ("extra", ctypes.c_void_p),
    ("padding", ctypes.c_char * 8),
]
Pointer = Any  # ctypes.POINTER(GgmlTensor)
OnNode = Callable[[Pointer, bool], bool]
"""Called before a node is computed (True asks to be called again with its data), and after (True continues)."""


@cache
def _functions() -> ctypes.CDLL:
    """Return ggml with our calls declared, after checking that its tensors have the layout that we mirror.

    Raises:
        ModelError: code "llama-cpp-mismatch".
    """
    library = ggml_library()
    library.ggml_tensor_overhead.restype = ctypes.c_size_t
    size = int(library.ggml_tensor_overhead()) - _OBJECT_BYTES
    if size != ctypes.sizeof(GgmlTensor):
        raise ModelError(
            f"ggml's tensors take {size} bytes in this llama-cpp-python instead of {ctypes.sizeof(GgmlTensor)}",
            "install llama-cpp-python 0.3.36, or give --imatrix FILE",
            code="llama-cpp-mismatch",
        )
    library.ggml_op_name.restype, library.ggml_op_name.argtypes = ctypes.c_char_p, [ctypes.c_int]
    for name in ("ggml_backend_tensor_get", "ggml_backend_tensor_set"):
        function = getattr(library, name)
        function.restype = None
        function.argtypes = [ctypes.POINTER(GgmlTensor), ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
    return library


def scheduler_callback(on_node: OnNode, failed: list[BaseException]) -> Callable[[int, bool], bool]:
    """Return on_node as `llama.Context` takes it; an exception ends the computation and is added to `failed`."""
    _functions()

    def call(address: int, is_asked: bool) -> bool:
        try:
            return on_node(ctypes.cast(address, ctypes.POINTER(GgmlTensor)), is_asked)
        except BaseException as error:  # ctypes would print it and continue
            failed.append(error)
            return False

    return call


def op_of(tensor: Pointer) -> str:
    """Return the operation that makes a tensor, such as `MUL_MAT`."""
    return str(_functions().ggml_op_name(tensor.contents.op).decode())


def name_of(tensor: Pointer) -> str:
    """Return a tensor's name; a copy on another device is called `CUDA0#blk.0.attn_q.weight#0`."""
    name = bytes(tensor.contents.name).decode("utf-8", "replace")
    return name.split("#")[1] if "#" in name else name


def address_of(tensor: Pointer) -> Pointer:
    """Return a pointer to a tensor that outlives the graph: one in a node's sources changes with it."""
    return ctypes.pointer(tensor.contents)


def values_of(tensor: Pointer) -> npt.NDArray[Any]:
    """Return a copy `[ne3, ne2, ne1, ne0]` of a float32 or int32 tensor, from whatever device it is on."""
    found = tensor.contents
    dtype = {_F32: np.float32, _I32: np.int32}.get(found.type)
    if dtype is None:
        raise ModelError(
            f"{name_of(tensor)} has ggml type {found.type}: only F32 and I32 can be read", code="type-unsupported"
        )
    shape, strides = found.ne[::-1], found.nb[::-1]
    n_bytes = 4 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    raw = np.empty(n_bytes, np.uint8)
    _functions().ggml_backend_tensor_get(tensor, raw.ctypes.data, 0, n_bytes)
    return np.lib.stride_tricks.as_strided(raw[:4].view(dtype), shape, strides).copy() if n_bytes else raw.view(dtype)


def set_f16(tensor: Pointer, rows: npt.NDArray[np.float32]) -> None:
    """Set the values of an F16 tensor with as many elements, on whatever device it is."""
    data = np.ascontiguousarray(rows, np.float16)
    found = tensor.contents
    if found.type != _F16 or data.size != int(np.prod(found.ne[:])):
        raise ValueError(f"{name_of(tensor)}: {data.size} values for an F16 tensor {list(found.ne)}, type {found.type}")
    _functions().ggml_backend_tensor_set(tensor, data.ctypes.data, 0, data.nbytes)
