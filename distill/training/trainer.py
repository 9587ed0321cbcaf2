"""`transformers.Trainer` with our objective, row order, schedule and optimizer groups, but its own loop.

So a training can use several devices by `accelerate launch` or `torchrun`. A step's loss is the weighted mean over all
targets of the step, however it is split into micro-batches and processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer_callback import PrinterCallback

from ...errors import ArtifactError, UsageError
from ...localrun.core.text import first_line
from ..device import NO_MEMORY
from ..recipe.training import TrainingRecipe
from .callback import Clock
from .distributed import processes
from .lora import parameter_groups


class ResumingTrainer(Trainer):
    """Reads the files of a checkpoint as numbers alone, as transformers does, and says which checkpoint it cannot read.

    Raises on a resume:
        ArtifactError: `code` "checkpoint-broken": a file was cut off, or no training wrote it.
    """

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with _reading(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _reading(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        with _reading(checkpoint):
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _reading(checkpoint):
            super()._load_rng_state(checkpoint)


@contextmanager
def _reading(checkpoint: str | None) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever is in the files: a run folder may come from anybody
        if NO_MEMORY.search(str(error)):
            raise
        raise ArtifactError(
            f"cannot read {checkpoint}: {first_line(error)}",
            "delete that folder: the same command resumes from the checkpoint before it, or from the start",
            code="checkpoint-broken",
        ) from error


class StudentTrainer(ResumingTrainer):
    """Trains a model whose forward is the objective."""

    loss_is_scaled_for_ga = True

    def __init__(self, settings: TrainingRecipe, clock: Clock, **keywords: Any) -> None:
        self._settings, self._clock = settings, clock
        super().__init__(callbacks=[clock], **keywords)
        self.remove_callback(PrinterCallback)
        if self.is_deepspeed_enabled:
            zero = self.accelerator.state.deepspeed_plugin.deepspeed_config.get("zero_optimization", {})
            if zero.get("stage") == 3:  # else the weights could not be gathered at the end
                zero["stage3_gather_16bit_weights_on_model_save"] = True

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None, **_: Any
    ) -> Any:
        """Return the batch's share of the step's mean loss."""
        total = model(**inputs)
        weight = inputs["weight"] if num_items_in_batch is None else num_items_in_batch
        # stays a tensor: reading its value would wait for the GPU
        weight = torch.as_tensor(weight, device=total.device).clamp(min=1e-9)
        # `weight` is that of all processes, whose gradients are averaged: times their number it is a mean over all
        loss = total * (self.accelerator.num_processes / weight)
        return (loss, None) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> torch.Tensor | None:
        if not batch_samples:
            return None
        # filled on the device: copying it there would wait for the GPU
        weight = torch.full((), sum(batch["weight"] for batch in batch_samples), device=device)
        return self.accelerator.gather(weight).sum() if self.accelerator.num_processes > 1 else weight

    def create_optimizer(self, model: Any = None) -> Any:
        """Return AdamW over the parameter groups."""
        if self.optimizer is None:
            groups = parameter_groups(model if model is not None else self.model, self._settings)
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, None)
            options.pop("lr", None)
            self.optimizer = kind(groups, lr=self.args.learning_rate, **options)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Return the schedule: by steps, or by the clock if minutes limit the training."""
        if self.lr_scheduler is None:
            rate = schedule(self._settings, lambda step: self._clock.progress(step / num_training_steps))
            optimizer = optimizer if optimizer is not None else self.optimizer
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def gathered_weights(self) -> dict[str, Any] | None:
        """Return all weights to the first process if each process holds a part (FSDP, DeepSpeed), otherwise None."""
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            return None
        gathered = self.accelerator.get_state_dict(self.model_wrapped)
        unset_hf_deepspeed_config()  # else the next model that is loaded would be sharded, too
        return dict(gathered or {})

    def floating_point_ops(self, inputs: Any) -> int:
        """Count nothing: transformers' formula is not right for packed rows."""
        return 0


def schedule(settings: TrainingRecipe, progress: Callable[[int], float]) -> Callable[[int], float]:
    """Return the factor of the peak learning rate by step: a linear warm-up, then a linear decay to `final_lr`."""

    def rate(step: int) -> float:
        done = progress(step)
        if done < settings.warmup:
            return max(done / settings.warmup, 0.01)
        return 1 - (1 - settings.final_lr) * (done - settings.warmup) / (1 - settings.warmup)

    return rate


def arguments(
    settings: TrainingRecipe, output_dir: Path, *, device: torch.device, micro_batch: int, autocast: bool, n_rows: int
) -> TrainingArguments:
    """Return Trainer's arguments; a process computes micro_batch rows at once, and all epochs have n_rows."""
    n_processes = processes()
    n_steps = -(-n_rows // settings.batch_size)
    given = TrainingArguments(
        output_dir=str(output_dir),
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=settings.batch_size // (micro_batch * n_processes),
        num_train_epochs=1,  # the rows hold every epoch already
        train_sampling_strategy="sequential",
        max_steps=min(settings.steps, n_steps) if settings.steps else -1,
        learning_rate=settings.peak_lr,
        weight_decay=settings.weight_decay,
        adam_beta2=0.99,
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        bf16=autocast,
        use_cpu=device.type == "cpu",
        logging_steps=1 if device.type == "cpu" else 10,
        logging_nan_inf_filter=False,  # `Clock` ends the training at a NaN
        save_strategy="no",  # `Clock` decides when
        report_to=reporters(settings.report_to),
        project="deepdistill",
        run_name=output_dir.resolve().parent.name,  # the run folder's
        disable_tqdm=True,
        remove_unused_columns=False,
        # a GPU computes while another process packs the next rows
        dataloader_num_workers=int(device.type == "cuda"),
        dataloader_pin_memory=device.type == "cuda",
        accelerator_config={"non_blocking": device.type == "cuda"},
        seed=settings.seed or 0,
        ddp_find_unused_parameters=False if n_processes > 1 else None,
    )
    use_one_gpu(given)
    return given


def use_one_gpu(given: TrainingArguments) -> None:
    """Have Trainer use one GPU per process: with more it uses DataParallel, which would split rows."""
    given._n_gpu = min(given.n_gpu, 1)


def reporters(names: Sequence[str]) -> list[str]:
    """Return the names of the trackers that get the loss, checked.

    Raises:
        UsageError: `code` "no-such-tracker" or "not-installed".
    """
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
    )

    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise UsageError(
                f"training.report_to: there is no tracker {name}",
                f"choose from {', '.join(sorted(INTEGRATION_TO_CALLBACK))}",
                code="no-such-tracker",
            )
        if name not in get_available_reporting_integrations():
            raise UsageError(
                f"training.report_to: {name} is not installed", f"pip install {name}", code="not-installed"
            )
    return list(names)
