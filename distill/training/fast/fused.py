"""Chains of elementwise operations as one kernel where the student stands on a GPU.

There each operation by itself reads and writes all its tensors, and that, not arithmetic, is what a small model's layer
takes. A CPU keeps the plain operations: its caches hold what goes from one to the next, and its results stay the same
to the bit.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch

DEVICES = {"cuda"}  # where chains are compiled

_MARKED_CALLS = 8  # of a chain: more cannot lead to another kernel
_log = logging.getLogger(__name__)

F = TypeVar("F", bound=Callable[..., Any])


def on_gpu(chain: F) -> F:
    """Return the function, compiled where its first tensor lies on a GPU, for any number of tokens and rows.

    Where the compiler does not work (it needs Triton and a C compiler) the operations stay what they are.
    """
    compiled: Callable[..., Any] | None = None  # at the first use: the compiler alone takes seconds to import
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
                _log.warning("no kernels of our own here, training is slower: %s", " ".join(str(error).split())[:200])
                compiled = chain
        return compiled(first, *others, **named)

    return call  # type: ignore[return-value]


def _mark(parts: list[Any]) -> None:
    """Say which sizes differ from batch to batch: the first, and of rows of heads the second too."""
    for part in parts:
        if isinstance(part, torch.Tensor) and part.dim() > 1:
            for dimension in range(2 if part.dim() > 2 else 1):
                torch._dynamo.maybe_mark_dynamic(part, dimension)


def multiply(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Return a * b in `out`, whatever its strides and number format."""
    if torch.compiler.is_compiling():  # which takes no `out=` with gaps between its rows
        return out.copy_(a * b)
    return torch.mul(a, b, out=out)
