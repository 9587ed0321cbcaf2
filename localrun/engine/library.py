"""llama.cpp's library, once a process: load it, keep its log, and check that the bindings fit it.

The log is kept, not shown: what llama.cpp calls an error is the reason when a call fails. Structs start from the
library's own defaults, since their fields change between releases, and a few of those defaults are checked: bindings
that do not fit their library would read nonsense.
"""

from __future__ import annotations

import ctypes
import re
from collections import deque
from functools import cache
from typing import Any

from ...errors import ModelError
from ..core.lazy import import_part
from ..machine.hardware import bound_spinning

bound_spinning()  # before OpenMP is loaded: it reads its settings once

try:
    import_part("llama_cpp", "llama_cpp")  # the C functions
    import llama_cpp as llama_cpp  # the rest of the engine takes it from here
except (ImportError, OSError, RuntimeError) as error:  # not installed, or built for another machine
    raise ModelError(
        f"llama-cpp-python does not work here: {error}",
        "pip install llama-cpp-python (it needs a C++ compiler), or without one: pip install llama-cpp-python "
        "--extra-index-url https://abetlen.github.io/llama-cpp-python/whl/cpu",
        code="llama-cpp-broken",
    ) from error

_ERROR, _CONTINUED = 4, 5  # ggml_log_level
_log: deque[tuple[int, str]] = deque(maxlen=200)


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def keep_log(level: int, text: bytes, _data: Any) -> None:
    """Keep a line that llama.cpp logs, or the rest of one."""
    if level == _CONTINUED and _log:
        level, before = _log.pop()
        _log.append((level, before + text.decode("utf-8", "replace")))
    else:
        _log.append((level, text.decode("utf-8", "replace")))


def clear_log() -> None:
    """Forget the log so far, before a call whose reason for failing is to be told."""
    _log.clear()


def logged_reason() -> str:
    """Return what llama.cpp said went wrong since the log was last cleared."""
    lines = [text.strip() for level, text in _log if level == _ERROR and text.strip()]
    if not lines:
        return "llama.cpp gives no reason"
    safe = "".join(letter if letter.isprintable() else "?" for letter in lines[0])
    return re.sub(r"^\w+: ", "", safe)  # the function's name tells a user nothing


@cache
def start_library() -> None:
    """Keep the log, start the backend, and check that the bindings fit the library.

    Raises:
        ModelError: code "llama-cpp-mismatch": they do not.
    """
    llama_cpp.llama_log_set(keep_log, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    context, model = llama_cpp.llama_context_default_params(), llama_cpp.llama_model_default_params()
    # From the front, the middle and the end of each struct: a field more or less shifts what comes after it.
    seen = (context.n_ubatch, context.rope_scaling_type, context.type_k, context.n_seq_max, model.vocab_only)
    if seen != (512, -1, 1, 1, False):
        raise mismatch()


def mismatch() -> ModelError:
    """Return the error of bindings that would read their library's structs wrongly."""
    return ModelError(
        f"llama-cpp-python {llama_version()} does not fit the llama.cpp library that it loads",
        "reinstall it: pip install --force-reinstall llama-cpp-python; and unset LLAMA_CPP_LIB_PATH",
        code="llama-cpp-mismatch",
    )


def llama_version() -> str:
    """Return the version of the installed bindings, and with it of llama.cpp."""
    import importlib.metadata

    try:
        return importlib.metadata.version("llama-cpp-python")
    except importlib.metadata.PackageNotFoundError:  # a checkout on the path
        return str(llama_cpp.__version__)


def has_amx() -> bool:
    """Whether the installed llama.cpp would multiply with AMX, which deepdistill does not let it use.

    It crashes in the first prompt where GCC compiled it: the tiles' shapes, which llama.cpp writes on the stack, are
    optimized away. Source: https://github.com/ggml-org/llama.cpp/pull/26954, seen with 0.3.36 and GCC 12.
    """
    return b"AMX_INT8 = 1" in llama_cpp.llama_print_system_info()
