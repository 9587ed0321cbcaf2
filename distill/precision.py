"""The number format and the threads that train fastest on this machine: measured, then kept for the whole run.

A processor may have bf16 instructions and be slow at them, and a second thread may be another program's. So the three
products of a linear layer (forward, gradient of the input, an adapter's) are timed at the student's own width.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import torch

_TRIALS = 5
_CLEAR = 1.15  # a change from the plain choice has to be faster by so much: the rest is noise


@dataclass(frozen=True)
class Choice:
    """A number format and a thread count; `ms` holds what was measured of each candidate."""

    dtype: torch.dtype
    threads: int
    ms: dict[str, float]


def fastest(width: int, inner: int, device: torch.device, n_tokens: int = 384) -> Choice:
    """Return what multiplies fastest on this machine: bf16 or fp32, on all of its cores or on half of them.

    width and inner are those of the student's MLP.
    """
    if device.type != "cpu":
        is_native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return Choice(torch.bfloat16 if is_native else torch.float32, torch.get_num_threads(), {})
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    before, ms = torch.get_num_threads(), dict[tuple[torch.dtype, int], float]()
    counts = sorted({cores, max(1, cores // 2)}, reverse=True)
    try:
        for threads in counts:
            torch.set_num_threads(threads)
            for dtype in (torch.float32, torch.bfloat16):
                ms[dtype, threads] = _time(width, inner, n_tokens, dtype)
    finally:
        torch.set_num_threads(before)
    dtype = torch.bfloat16 if ms[torch.bfloat16, cores] * _CLEAR < ms[torch.float32, cores] else torch.float32
    threads = min(counts, key=lambda count: ms[dtype, count] * (1.0 if count == cores else _CLEAR))
    return Choice(dtype, threads, {f"{_name(kind)} x{count}": round(1e3 * t, 3) for (kind, count), t in ms.items()})


def _time(width: int, inner: int, n_tokens: int, dtype: torch.dtype) -> float:
    """Return the least seconds of a layer's products among a few trials."""
    x = torch.randn(n_tokens, width).to(dtype)
    weight = torch.randn(inner, width).to(dtype)
    a = torch.randn(16, width).to(dtype)
    times = []
    for _ in range(_TRIALS):
        start = time.perf_counter()
        y = torch.nn.functional.linear(x, weight)
        torch.nn.functional.linear(x, a)
        y @ weight
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _name(dtype: torch.dtype) -> str:
    return "bf16" if dtype == torch.bfloat16 else "fp32"
