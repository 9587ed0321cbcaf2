"""The plan that a training makes at its start: number format, threads, and how many rows are computed at once.

It is kept in `checkpoints/plan.json`, so that a run that was killed and resumed ends with the same weights as one that
was not.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch

from ...errors import ModelError, UsageError
from ...localrun.core.atomic import write_text
from ..device import SMALL_MODEL, fastest
from ..recipe.training import TrainingRecipe
from .distributed import is_first, processes, shared
from .rows import Row

_PLAN_FILE = "plan.json"  # in the folder of the checkpoints


@dataclass(frozen=True)
class StepPlan:
    """How every step is computed. `micro_batch` is the number of rows that a process computes at once."""

    dtype: str
    threads: int
    micro_batch: int

    @property
    def torch_dtype(self) -> torch.dtype:
        """The number format of frozen weights and products."""
        return torch.bfloat16 if self.dtype == "bf16" else torch.float32

    def smaller(self, settings: TrainingRecipe, folder: Path) -> StepPlan:
        """Return a plan with at most half the rows at once, and store it; a step has as many rows in all as before.

        Raises:
            ModelError: `code` "model-too-large": this plan computes one row at a time already.
        """
        if self.micro_batch == 1:
            raise ModelError(
                "not even one row at a time fits the memory",
                "give a smaller --max-length, or train an adapter, not --weights full",
                code="model-too-large",
            )
        plan = replace(self, micro_batch=_divisor(settings.batch_size // processes(), self.micro_batch // 2))
        write_text(folder / _PLAN_FILE, json.dumps(asdict(plan)) + "\n")
        return plan


def make_plan(
    base_dir: Path, rows: Sequence[Row], *, settings: TrainingRecipe, device: torch.device, folder: Path
) -> StepPlan:
    """Return the plan that the training began with, or make one; `folder` is that of its checkpoints.

    Raises:
        UsageError: `code` "batch-not-shared": the rows of a step cannot be divided equally among the processes.
    """
    share, left = divmod(settings.batch_size, processes())
    if left or not share:
        raise UsageError(
            f"{processes()} processes cannot share the {settings.batch_size} rows of a step",
            "set training.batch_size to a multiple of the number of processes",
            code="batch-not-shared",
        )
    path = folder / _PLAN_FILE
    if is_first() and not path.exists():
        plan = _measured(base_dir, rows, settings=settings, device=device)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(asdict(replace(plan, micro_batch=_divisor(share, plan.micro_batch)))) + "\n")
    # The first process decides for all. A resumed run may have other processes.
    values: dict[str, Any] = shared(json.loads(path.read_text(encoding="utf-8")) if is_first() else {})
    return StepPlan(**values | {"micro_batch": _divisor(share, values["micro_batch"])})


def _measured(base_dir: Path, rows: Sequence[Row], *, settings: TrainingRecipe, device: torch.device) -> StepPlan:
    config = json.loads((base_dir / "config.json").read_text(encoding="utf-8"))
    config = config.get("text_config", config)
    dtype, threads = fastest(*_widths(config), device)
    is_small = sum(file.stat().st_size for file in base_dir.glob("*.safetensors")) < 2 * SMALL_MODEL
    kind = settings.dtype or ("fp32" if is_small or dtype == torch.float32 else "bf16")
    longest = max(len(row.input_ids) for row in rows)
    return StepPlan(kind, settings.threads or threads, settings.micro_batch or _n_fitting(config, longest, device))


def _widths(config: dict[str, Any]) -> tuple[int, int]:
    """Return the widths of the states and of the MLP."""
    width: int = config.get("hidden_size", 512)
    return width, config.get("intermediate_size") or 4 * width


def _n_fitting(config: dict[str, Any], n_tokens: int, device: torch.device) -> int:
    """Estimate how many rows of n_tokens fit the memory at once, with room to spare."""
    width, inner = _widths(config)
    # kept for the backward pass, per token and layer: 12 tensors as wide as the states and 4 as the MLP, 4 bytes each
    row_bytes = n_tokens * config.get("num_hidden_layers", 32) * (12 * width + 4 * inner) * 4
    on_gpu = device.type == "cuda"
    free = torch.cuda.mem_get_info(device)[0] if on_gpu else psutil.virtual_memory().available
    return max(1, int(0.5 * free / row_bytes))


def _divisor(share: int, most: int) -> int:
    """Return the largest number of rows at once that divides a process's share of a step."""
    return next(n for n in range(min(share, most), 0, -1) if share % n == 0)
