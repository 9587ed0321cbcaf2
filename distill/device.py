"""Which device and number format to compute in on this machine."""

from __future__ import annotations

import re

import torch

from ..errors import UsageError

NO_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory", re.I)
SMALL_MODEL = 20_000_000  # parameters: smaller models gain nothing from bf16 and lose digits


def choose_device(name: str = "auto") -> torch.device:
    """Return the named device; `auto` is CUDA where there is one, else the CPU.

    Raises:
        UsageError: there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"there is no device {name!r} here", "use auto, cpu or cuda") from error
    return device


def has_fast_bf16(device: torch.device) -> bool:
    """Say whether bf16 matrix products are native there: on a CPU, AVX-512 BF16 or AMX."""
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
