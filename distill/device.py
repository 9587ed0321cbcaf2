"""Which device, number format and number of threads to compute with on this machine.

A processor may have bf16 instructions and be slow at them, and another program may need its second core. So training
times the three products of a linear layer (forward, gradient of the input, an adapter's) at the student's own width.
"""

from __future__ import annotations

import os
import re
import time
import warnings

import torch

from ..errors import UsageError

NO_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory", re.I)
SMALL_MODEL = 20_000_000  # parameters: smaller models gain nothing from bf16 and lose digits
_TRIALS = 5
_CLEAR = 1.15  # a change from the plain choice has to be faster by this factor: the rest is noise


def choose_device(name: str = "auto") -> torch.device:
    """Return the named device; `auto` is CUDA where there is one, else the CPU.

    Raises:
        UsageError: `code` "no-such-device".
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(
            f"this machine has no device {name!r}", "use auto, cpu or cuda", code="no-such-device"
        ) from error
    return device


def has_fast_bf16(device: torch.device) -> bool:
    """Say whether the device multiplies bf16 matrices natively: a CPU needs AVX-512 BF16 or AMX."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.backends.cpu.get_cpu_capability() if torch.backends.mkldnn.is_available() else ""
    return "AVX512" in capabilities and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def inference_dtype(n_parameters: int, device: torch.device) -> torch.dtype:
    """Return the fastest number format that keeps a model's answers: bf16 only where the hardware multiplies it."""
    if n_parameters < SMALL_MODEL:
        return torch.float32
    if has_fast_bf16(device):
        return torch.bfloat16
    return torch.float16 if device.type == "cuda" else torch.float32


def fastest(width: int, inner: int, device: torch.device) -> tuple[torch.dtype, int]:
    """Return the number format and the number of threads that multiply fastest on this machine.

    On a CPU it measures bf16 and fp32, on all of its cores and on half of them. `width` and `inner` are the hidden and
    intermediate sizes of the student's MLP.
    """
    if device.type != "cpu":
        is_native = device.type == "cuda" and has_fast_bf16(device)
        return torch.bfloat16 if is_native else torch.float32, torch.get_num_threads()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))  # torchrun's processes share them
    before, seconds = torch.get_num_threads(), dict[tuple[torch.dtype, int], float]()
    counts = sorted({cores, max(1, cores // 2)}, reverse=True)
    try:
        for threads in counts:
            torch.set_num_threads(threads)
            for dtype in (torch.float32, torch.bfloat16):
                seconds[dtype, threads] = _layer_seconds(width, inner, dtype)
    finally:
        torch.set_num_threads(before)
    is_bf16 = seconds[torch.bfloat16, cores] * _CLEAR < seconds[torch.float32, cores]
    dtype = torch.bfloat16 if is_bf16 else torch.float32
    return dtype, min(counts, key=lambda count: seconds[dtype, count] * (1.0 if count == cores else _CLEAR))


def _layer_seconds(width: int, inner: int, dtype: torch.dtype) -> float:
    """Return the shortest time, in seconds, of a layer's products over a batch of some 400 tokens."""
    x = torch.randn(384, width).to(dtype)
    weight = torch.randn(inner, width).to(dtype)
    a = torch.randn(16, width).to(dtype)
    times = []
    for _ in range(_TRIALS):
        start = time.perf_counter()
        y = torch.nn.functional.linear(x, weight)
        torch.nn.functional.linear(x, a)
        y @ weight
        times.append(time.perf_counter() - start)
    return min(times[1:])  # the first one warms up


def quiet_transformers() -> None:
    """Silence transformers' progress bars and everything below an error: only deepdistill's own are shown."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # tqdm reads it when it is first imported
    from transformers.utils import logging

    # peft uses a deprecated name of transformers; users of deepdistill can do nothing about it.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
