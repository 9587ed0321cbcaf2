"""Turn a Hugging Face checkpoint into a GGUF file and measure what was lost. Converts without torch.

The stage can be called as a function: `deepdistill.quantize(folder)` is `release.quantize(folder)`. A package hides a
function of its own name as soon as it is imported, so the package answers for both.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .report import QuantizeReport


class _Stage(ModuleType):
    def __call__(self, *args: Any, **settings: Any) -> QuantizeReport:
        """Write a GGUF of a checkpoint folder: see `release.quantize`."""
        from .release import quantize

        return quantize(*args, **settings)


sys.modules[__name__].__class__ = _Stage
