"""Import one module of a package without running the rest of the package.

Both packages that every chat needs import numpy, and more that a chat never uses, before they offer a constant or a C
function: gguf its readers and writers, llama_cpp its high-level class. That took a third of a chat's start, once the
file was cached.
"""

from __future__ import annotations

import sys
import threading
from importlib import import_module
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import Any


def import_part(package: str, part: str) -> None:
    """Make `import package` offer the public names of `package.part`; any other name loads the whole package.

    This does nothing if the package is already imported or cannot be found: the import itself reports that.

    Raises:
        ImportError, OSError, RuntimeError: what the part raises.
    """
    if package in sys.modules or (spec := find_spec(package)) is None or spec.loader is None:
        return
    module, loader, lock = module_from_spec(spec), spec.loader, threading.RLock()
    loading = False

    def load_all(name: str) -> Any:
        nonlocal loading
        if name.startswith("__") and name not in ("__version__", "__all__"):  # Python asks for others of any module
            raise AttributeError(name)
        with lock:
            if "__getattr__" in vars(module) and not loading:
                loading = True
                try:
                    loader.exec_module(module)
                finally:
                    loading = False
                del vars(module)["__getattr__"]
        if name not in vars(module):
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return vars(module)[name]

    sys.modules[package] = module
    try:
        held = import_module(f"{package}.{part}")
    except BaseException:
        del sys.modules[package]
        raise
    vars(module).update(_public(held), __getattr__=load_all)


def _public(module: ModuleType) -> dict[str, Any]:
    names = getattr(module, "__all__", [name for name in vars(module) if not name.startswith("_")])
    return {name: vars(module)[name] for name in names}
