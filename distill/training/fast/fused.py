"""Chains of elementwise operations, each compiled to one kernel if the student is on a GPU.

There, every single operation reads and writes whole tensors, and a small model's layer spends its time on that, not on
arithmetic. On a CPU the plain operations stay: its caches hold what one passes to the next, and results stay the same
to the bit.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch

DEVICES = {"cuda"}  # where chains are compiled

_MARKED_CALLS = 8  # per chain: torch compiles no more versions of a function than that
_log = logging.getLogger(__name__)

F = TypeVar("F", bound=Callable[..., Any])


def on_gpu(chain: F) -> F:
    """Return the function, compiled if its first tensor is on a GPU, for any number of tokens and rows.

    If the compiler does not work, which needs Triton and a C compiler, the plain operations run.
    """
    compiled: Callable[..., Any] | None = None  # made at the first call: importing the compiler takes seconds
    n_calls = 0

    @wraps(chain)
    def call(first: torch.Tensor, *others: Any, **named: Any) -> Any:
        nonlocal compiled, n_calls
        if first.device.type not in DEVICES:
            return chain(first, *others, **named)
        compiled = compiled or torch.compile(chain)
        if n_calls < _MARKED_CALLS:
            n_calls += 1
            _mark([first, *others, *named.values()])
            try:
                return compiled(first, *others, **named)
            except torch._dynamo.exc.TorchDynamoException as error:  # before anything was computed
                _log.warning("cannot compile kernels, so training is slower: %s", " ".join(str(error).split())[:200])
                compiled = chain
        return compiled(first, *others, **named)

    return call  # type: ignore[return-value]


def _mark(parts: list[Any]) -> None:
    """Tell the compiler which sizes differ from batch to batch: the first, and of `[n, L, …]` the second too."""
    for part in parts:
        if isinstance(part, torch.Tensor) and part.dim() > 1:
            for dimension in range(2 if part.dim() > 2 else 1):
                torch._dynamo.maybe_mark_dynamic(part, dimension)


def multiply(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Return a * b in `out`, whatever its strides and number format."""
    if torch.compiler.is_compiling():  # the compiler takes no `out=` with gaps between its rows
        return out.copy_(a * b)
    return torch.mul(a, b, out=out)
