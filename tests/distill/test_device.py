"""Devices and number formats on this machine."""

from __future__ import annotations

import os

import pytest
import torch

from deepdistill.distill.device import SMALL_MODEL, choose_device, fastest, has_fast_bf16, inference_dtype
from deepdistill.errors import UsageError

CPU = torch.device("cpu")


def test_a_device_is_found_or_refused() -> None:
    assert choose_device("cpu") == CPU
    assert choose_device().type in ("cpu", "cuda")
    with pytest.raises(UsageError, check=lambda error: error.code == "no-such-device"):
        choose_device("abacus")


def test_small_models_keep_their_digits() -> None:
    assert inference_dtype(SMALL_MODEL - 1, CPU) == torch.float32
    assert inference_dtype(SMALL_MODEL, CPU) == (torch.bfloat16 if has_fast_bf16(CPU) else torch.float32)


def test_what_trains_fastest_is_measured_and_the_threads_are_put_back() -> None:
    before = torch.get_num_threads()
    dtype, threads = fastest(64, 128, CPU)
    assert torch.get_num_threads() == before
    assert dtype in (torch.float32, torch.bfloat16)
    assert 1 <= threads <= (os.cpu_count() or 1)
