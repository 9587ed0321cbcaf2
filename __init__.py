"""deepdistill: put a large teacher's reasoning into a small open model that runs on a laptop.

The names in `__all__` are the public ones. Each loads its stage when it is first asked for, so that
`import deepdistill` loads no library.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .distill.evaluation.evaluate import evaluate
    from .distill.graders.pool import grade
    from .distill.problems.load import load_problems
    from .distill.recipe.teach import TeachRecipe
    from .distill.records import Trace
    from .distill.teach import teach
    from .distill.teachers import open_teacher
    from .distill.traces.store import TraceStore
    from .errors import ArtifactError, DeepDistillError, GateError, ModelError, TeacherError, UsageError
    from .localrun.chat.chat import chat
    from .localrun.engine.engine import Engine
    from .quantize.release import quantize

__version__ = "0.1.0"

__all__ = [
    "ArtifactError",
    "DeepDistillError",
    "Engine",
    "GateError",
    "ModelError",
    "TeachRecipe",
    "TeacherError",
    "Trace",
    "TraceStore",
    "UsageError",
    "__version__",
    "chat",
    "evaluate",
    "grade",
    "load_problems",
    "open_teacher",
    "quantize",
    "teach",
]

_HOMES = {
    "ArtifactError": "errors",
    "DeepDistillError": "errors",
    "Engine": "localrun.engine.engine",
    "GateError": "errors",
    "ModelError": "errors",
    "TeachRecipe": "distill.recipe.teach",
    "TeacherError": "errors",
    "Trace": "distill.records",
    "TraceStore": "distill.traces.store",
    "UsageError": "errors",
    "chat": "localrun.chat.chat",
    "evaluate": "distill.evaluation.evaluate",
    "grade": "distill.graders.pool",
    "load_problems": "distill.problems.load",
    "open_teacher": "distill.teachers",
    "teach": "distill.teach",
}


def __getattr__(name: str) -> Any:
    """Load a public name from its module."""
    if name == "quantize":
        return import_module(".quantize", __name__)  # the stage has the function's name, and can be called like it
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
