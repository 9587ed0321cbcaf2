"""Teach a student its rows: `transformers.Trainer` carries the loop; rows, loss, schedule and clock are ours.

The vocabulary projection, the dearest product of a small model, is computed only where there is a target. The frozen
weights stand in bf16 where the machine multiplies it natively; what learns stays in fp32 under autocast. With `minutes`
the learning rate follows the clock, so that it has decayed whatever the machine's speed was.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from ..errors import ArtifactError, ModelError, UsageError
from ..localrun.progress import Progress, no_progress
from .device import choose_device, has_fast_bf16
from .losses import LOSSES, projected_loss
from .packing import Batch, pad
from .quiet import quiet_transformers
from .rows import Row, order_rows

# torch's and safetensors' ways to say so
_DISK_FULL = re.compile(r"No space left|File too large|inline_container|PytorchStreamWriter|os error")
_CLOCK_FILE = "clock.json"  # written last into a checkpoint: one without it was cut off


@dataclass(frozen=True)
class TrainSettings:
    """How to train. `lr` None is 6e-4 for LoRA and 1e-4 for all weights; `minutes` None trains `epochs` to the end.

    Layers below `lora_first_layer` have no adapter, so the backward pass stops there: a third of them left out makes a
    step about 1.4 times as fast.
    """

    full: bool = False
    lora_rank: int = 32
    lora_alpha: int = 32
    lora_first_layer: int = 0
    lr: float | None = None
    batch_size: int = 16
    epochs: int = 3
    minutes: float | None = None
    max_length: int = 1024
    warmup: float = 0.03
    final_lr: float = 0.05
    weight_decay: float = 0.0
    save_every_s: float = 60.0
    seed: int = 0

    @property
    def peak_lr(self) -> float:
        """The highest learning rate of the schedule."""
        return self.lr if self.lr is not None else (1e-4 if self.full else 6e-4)


@dataclass(frozen=True)
class TrainReport:
    """What a training run did. `tokens_per_s` counts every token of the rows, prompts included, without padding."""

    steps: int
    rows: int
    tokens: int
    minutes: float
    tokens_per_s: float
    final_loss: float


def train(
    base_dir: Path,
    rows: Sequence[Row],
    tokenizer: Any,
    settings: TrainSettings,
    checkpoints_dir: Path,
    out: Path,
    on_progress: Progress = no_progress,
    *,
    is_ordered: bool = False,
) -> TrainReport:
    """Train the checkpoint in base_dir on rows and save it, merged, to out; go on from the last whole checkpoint.

    With `is_ordered` the rows are those of every epoch, in order (a curriculum's).

    Raises:
        ModelError: the weights cannot be loaded.
        ArtifactError: the disk is full.
    """
    device = choose_device()
    ordered = list(rows) if is_ordered else order_rows(rows, settings.batch_size, settings.epochs, settings.seed)
    model = _load(base_dir, settings, device)
    clock = _Clock(settings, ordered, on_progress)
    trainer = _Trainer(
        settings,
        clock,
        model=model,
        args=_arguments(settings, checkpoints_dir, device),
        train_dataset=ordered,
        data_collator=lambda batch: pad(batch, tokenizer.pad_token_id).inputs(),
        callbacks=[clock],
    )
    trainer.remove_callback(PrinterCallback)
    with _disk_errors(checkpoints_dir):
        trainer.train(resume_from_checkpoint=_last_checkpoint(checkpoints_dir))
        _save_merged(trainer.model, base_dir, tokenizer, out)
    return clock.report(trainer.state.global_step)


def batch_loss(model: Any, batch: Batch) -> torch.Tensor:
    """Return the weighted mean of what the batch's targets cost; 0 where there is no target."""
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden = causal_lm.get_decoder()(input_ids=batch.input_ids, use_cache=False).last_hidden_state  # [B, T, H]
    head = causal_lm.get_output_embeddings()
    wanted = hidden.flatten(0, 1)[batch.positions]  # [N, H]
    total = projected_loss(wanted, head.weight, batch.targets, batch.segments, LOSSES, bias=head.bias)
    return total / max(batch.weight, 1e-9)


class _Trainer(Trainer):
    """`transformers.Trainer` with our loss, row order and schedule."""

    def __init__(self, settings: TrainSettings, clock: _Clock, **keywords: Any) -> None:
        self._settings, self._clock = settings, clock
        super().__init__(**keywords)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None, **_: Any
    ) -> Any:
        with self.compute_loss_context_manager():
            loss = batch_loss(model, Batch(**inputs))
        return (loss, None) if return_outputs else loss

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        rows: Any = train_dataset if train_dataset is not None else self.train_dataset
        return SequentialSampler(rows)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None:
            rate = _schedule(self._settings, lambda step: self._clock.progress(step / num_training_steps))
            optimizer = optimizer if optimizer is not None else self.optimizer
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
            self._created_lr_scheduler = True
        return self.lr_scheduler


class _Clock(TrainerCallback):
    """Knows how far the run is, by time where it is boxed; saves a checkpoint every minute; stops; reports."""

    def __init__(self, settings: TrainSettings, rows: Sequence[Row], on_progress: Progress) -> None:
        self._settings, self._on_progress = settings, on_progress
        self._tokens = [len(row.input_ids) for row in rows]
        self._before = 0.0  # seconds of training before this process
        self._started = self._saved = time.monotonic()
        self._losses: list[float] = []

    def seconds(self) -> float:
        return self._before + time.monotonic() - self._started

    def progress(self, steps_done: float) -> float:
        """Return how much of the run is done, 0 to 1."""
        if self._settings.minutes is None:
            return steps_done
        return min(1.0, max(steps_done, self.seconds() / (60 * self._settings.minutes)))

    def report(self, steps: int) -> TrainReport:
        """Sum the run up after its last step."""
        n_rows = min(steps * self._settings.batch_size, len(self._tokens))
        tokens = sum(self._tokens[:n_rows])
        last = self._losses[-20:]
        return TrainReport(
            steps=steps,
            rows=n_rows,
            tokens=tokens,
            minutes=round(self.seconds() / 60, 2),
            tokens_per_s=round(tokens / max(self.seconds(), 1e-9), 1),
            final_loss=round(sum(last) / len(last), 4) if last else 0.0,
        )

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        saved = Path(args.output_dir) / f"checkpoint-{state.global_step}" / _CLOCK_FILE
        if saved.exists():
            self._before = json.loads(saved.read_text())["seconds"]
        self._started = self._saved = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        done = self.progress(state.global_step / state.max_steps)
        if done >= 1:
            control.should_training_stop = True
        if time.monotonic() - self._saved >= self._settings.save_every_s or done >= 1:
            control.should_save = True
            self._saved = time.monotonic()
        rate = sum(self._tokens[: state.global_step * self._settings.batch_size]) / self.seconds()
        loss = f"loss {self._losses[-1]:.3f}, " if self._losses else ""
        self._on_progress("training", done, 1.0, f"{loss}{rate:.0f} tokens/s")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self._losses.append(float(logs["loss"]))

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        (folder / _CLOCK_FILE).write_text(json.dumps({"seconds": self.seconds()}))
        for older in _checkpoints(Path(args.output_dir))[:-1]:
            shutil.rmtree(older, ignore_errors=True)


def _schedule(settings: TrainSettings, progress: Callable[[int], float]) -> Callable[[int], float]:
    """Return the learning rate's factor by step: a linear warm-up, then a linear way down to `final_lr`."""

    def rate(step: int) -> float:
        done = progress(step)
        if done < settings.warmup:
            return max(done / settings.warmup, 0.01)
        return 1 - (1 - settings.final_lr) * (done - settings.warmup) / (1 - settings.warmup)

    return rate


def _arguments(settings: TrainSettings, checkpoints_dir: Path, device: torch.device) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(checkpoints_dir),
        per_device_train_batch_size=settings.batch_size,
        num_train_epochs=1,  # the rows hold every epoch already, in order
        learning_rate=settings.peak_lr,
        weight_decay=settings.weight_decay,
        adam_beta2=0.99,
        max_grad_norm=1.0,
        bf16=has_fast_bf16(device),
        use_cpu=device.type == "cpu",
        logging_steps=5,
        save_strategy="no",  # the clock says when
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
        seed=settings.seed,
    )


def _load(base_dir: Path, settings: TrainSettings, device: torch.device) -> Any:
    """Load the student, with a LoRA adapter on every linear layer unless all weights are trained."""
    quiet_transformers()
    frozen = torch.bfloat16 if has_fast_bf16(device) and not settings.full else torch.float32
    try:
        model = AutoModelForCausalLM.from_pretrained(base_dir, dtype=frozen, attn_implementation="sdpa")
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"cannot load the student in {base_dir}: {str(error).splitlines()[0]}") from error
    model.config.use_cache = False
    if settings.full:
        return model
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(settings.seed)
    linears = _linears(model, settings.lora_first_layer)
    lora = LoraConfig(
        r=settings.lora_rank, lora_alpha=settings.lora_alpha, target_modules=linears, task_type="CAUSAL_LM"
    )
    return get_peft_model(model, lora)  # adapters in fp32


def _save_merged(model: Any, base_dir: Path, tokenizer: Any, out: Path) -> None:
    """Write a plain checkpoint in the base's number format, merged in fp32, beside its place, then rename."""
    temporary = out.with_name(f".{out.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        if hasattr(model, "peft_config"):
            model = _merged(model, base_dir)
        stored = _stored_dtype(base_dir) or torch.float32
        model.config.use_cache = True
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        model.config.eos_token_id = tokenizer.eos_token_id
        model.config.pad_token_id = tokenizer.pad_token_id
        model.to(device="cpu", dtype=stored).save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        for card in ("README.md", "LICENSE"):
            if (base_dir / card).exists():
                shutil.copy(base_dir / card, temporary / card)
        shutil.rmtree(out, ignore_errors=True)
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """Translate what a full or unwritable disk makes Python, torch and safetensors raise."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        text = str(error)
        if not isinstance(error, OSError) and not _DISK_FULL.search(text):
            raise
        reason = text if isinstance(error, OSError) else "the disk is full, or files may not grow so large"
        raise ArtifactError(
            f"cannot write in {folder.parent}: {reason}",
            "free some disk space; the same command goes on from the last whole checkpoint",
        ) from error


def _linears(model: Any, first_layer: int) -> list[str]:
    """Return the names of every linear map in the decoder's layers from first_layer on."""
    found = []
    for name, module in model.get_decoder().layers.named_modules():
        if isinstance(module, torch.nn.Linear) and int(name.split(".")[0]) >= first_layer:
            found.append(f"layers.{name}")
    if not found:
        raise UsageError(f"the student has no layer {first_layer}", "give a smaller --lora-first-layer")
    return found


def _merged(adapted: Any, base_dir: Path) -> Any:
    """Return the base model as it stands on disk, in fp32, with the adapter's deltas added."""
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    base = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    fresh = get_peft_model(base, adapted.peft_config["default"])
    set_peft_model_state_dict(fresh, get_peft_model_state_dict(adapted))
    return fresh.to("cpu").merge_and_unload()


def _stored_dtype(folder: Path) -> torch.dtype | None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    name = config.get("dtype") or config.get("torch_dtype")
    return getattr(torch, name) if isinstance(name, str) else None


def _checkpoints(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("checkpoint-*") if path.name.split("-")[1].isdigit()]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def _last_checkpoint(folder: Path) -> str | None:
    """Return the newest whole checkpoint, deleting those that were cut off while being written."""
    whole = None
    for path in _checkpoints(folder):
        if (path / _CLOCK_FILE).exists():
            whole = str(path)
        else:
            shutil.rmtree(path, ignore_errors=True)
    return whole
