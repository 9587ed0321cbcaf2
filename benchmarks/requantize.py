"""llama.cpp's own quantizer, GGUF in and GGUF out: what ours is measured against.

The parameters are a struct that grows from release to release. It is fetched into room for a larger one, so that fields
which the bindings don't know keep the library's own defaults, and values from its front, middle and end are checked: a
field more or less in between would shift them.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from deepdistill.errors import ArtifactError
from deepdistill.localrun.engine.library import clear_log, llama_cpp, logged_reason, mismatch, start_library

_ROOM = 512  # bytes
_Q8_0, _MOST_TYPES = 7, 256


class _Params(ctypes.Structure):
    _fields_ = (("bytes", ctypes.c_uint8 * _ROOM),)


def requantize(
    source: Path,
    out: Path,
    *,
    ftype: int,
    importance: Mapping[str, npt.NDArray[np.float32]] | None = None,
    types: Mapping[str, int] | None = None,
    n_threads: int = 0,
) -> None:
    """Let llama.cpp quantize a GGUF of full precision to a file type, numbered as `LlamaFileType` numbers them.

    Args:
        source: the file to read.
        out: the file to write.
        ftype: the recipe.
        importance: tensor name -> weight of each column, of each expert one after the other.
        types: tensor name -> ggml type, for every tensor that is not to have the recipe's.
        n_threads: all cores if 0.

    Raises:
        ArtifactError: code "quantize-failed": llama.cpp cannot do it; the reason is its own.
        ModelError: code "llama-cpp-mismatch": the bindings do not fit the library.
    """
    start_library()
    room, params = default_params()
    params.ftype, params.nthread = ftype, n_threads
    alive: list[Any] = []  # what the struct points to
    if importance:
        params.imatrix = importance_array(importance, alive)
    if types:
        array = (llama_cpp.llama_model_tensor_override * (len(types) + 1))()  # a null pattern ends it
        for entry, (name, type_) in zip(array, types.items(), strict=False):
            entry.pattern, entry.type = f"^{re.escape(name)}$".encode(), type_
        alive.append(array)
        params.tt_overrides = ctypes.cast(array, ctypes.POINTER(llama_cpp.llama_model_tensor_override))
    clear_log()
    pointer = ctypes.cast(ctypes.byref(room), ctypes.POINTER(llama_cpp.llama_model_quantize_params))
    if llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(out), pointer) != 0:
        raise ArtifactError(f"llama.cpp cannot quantize {source}: {logged_reason()}", code="quantize-failed")


def default_params() -> tuple[ctypes.Structure, Any]:
    """Return (the library's defaults with room behind, the bindings' view of them)."""
    function: Any = llama_cpp.llama_model_quantize_default_params
    before, function.restype = function.restype, _Params
    try:
        room = function()
    finally:
        function.restype = before
    params = llama_cpp.llama_model_quantize_params.from_buffer(room)
    none = int(params.output_tensor_type)  # GGML_TYPE_COUNT
    last = getattr(params, "max_buf_size", 1 << 33)
    flags = (params.allow_requantize, params.quantize_output_tensor, params.only_copy, params.pure)
    seen = (params.nthread, params.ftype, params.token_embedding_type, *flags, bool(params.imatrix), last)
    if seen != (0, _Q8_0, none, False, True, False, False, False, 1 << 33) or not 30 < none < _MOST_TYPES:
        raise mismatch()
    return room, params


def importance_array(importance: Mapping[str, npt.NDArray[np.float32]], alive: list[Any]) -> Any:
    """Return an importance matrix as the struct takes it; what it points to is put into `alive`."""
    kind = llama_cpp.llama_model_imatrix_data
    array = (kind * (len(importance) + 1))()  # a null name ends it
    for entry, (name, weights) in zip(array, importance.items(), strict=False):
        flat = np.ascontiguousarray(weights, np.float32).reshape(-1)
        alive.append(flat)
        entry.name, entry.size = name.encode(), flat.size
        entry.data = flat.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    alive.append(array)
    return ctypes.cast(array, ctypes.POINTER(kind))
