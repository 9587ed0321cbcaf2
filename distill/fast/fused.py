"""Chains of elementwise operations as one kernel where the student stands on a GPU.

There each operation by itself reads and writes all its tensors, and that, not arithmetic, is what a small model's layer
takes. A CPU keeps the plain operations: its caches hold what goes from one to the next, and its results stay the same
to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import Any, TypeVar

import torch

DEVICES = {"cuda"}  # where chains are compiled

F = TypeVar("F", bound=Callable[..., Any])


def on_gpu(chain: F) -> F:
    """Return the function, compiled where its first tensor lies on a GPU; all sizes but the first are fixed."""

    @cache  # at the first use: the compiler alone takes seconds to import
    def compiled() -> Callable[..., Any]:
        return torch.compile(chain)

    @wraps(chain)
    def call(first: torch.Tensor, *others: Any, **named: Any) -> Any:
        if first.device.type not in DEVICES:
            return chain(first, *others, **named)
        for part in (first, *others, *named.values()):
            if isinstance(part, torch.Tensor) and part.dim() > 1:
                torch._dynamo.maybe_mark_dynamic(part, 0)
        return compiled()(first, *others, **named)

    return call  # type: ignore[return-value]


def multiply(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Return a * b in `out`, whatever its strides and number format."""
    if torch.compiler.is_compiling():  # which takes no `out=` with gaps between its rows
        return out.copy_(a * b)
    return torch.mul(a, b, out=out)
