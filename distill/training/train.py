"""Teach a student its rows: the plan, the run, and what is left of it.

`transformers.Trainer` carries the loop (`trainer`), the rows say which loss they carry (`losses`), the states come from
the fastest pass that is exact (`objective`). What is measured at the start, number format, threads and rows at once, is
written down (`checkpoints/plan.json`) and kept, so that a run that was killed comes to the very weights of one that was
not.
"""

from __future__ import annotations

import gc
import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from safetensors import SafetensorError

from ...errors import ArtifactError, ModelError, UsageError
from ...localrun.core.reporter import Progress, no_progress
from ..device import NO_MEMORY, SMALL_MODEL, choose_device, fastest
from ..run import write_text
from ..tokenizer import Tokenizer
from .callback import Clock, Validation, last_checkpoint, validation_of
from .distributed import is_first, processes
from .lora import check_vocabulary, load_base, load_student
from .merge import merge_adapter, save_adapter, save_checkpoint
from .objective import Objective
from .packing import Batch
from .report import TrainReport, TrainSettings
from .rows import Row, order_rows
from .trainer import StudentTrainer, arguments

__all__ = ["TrainReport", "TrainSettings", "train"]

# torch's and safetensors' ways to say so
_DISK_FULL = re.compile(r"No space left|File too large|inline_container|PytorchStreamWriter|os error")
_PLAN_FILE = "plan.json"
_ROWS_FILE = "rows.sha256"
_N_CHECKED = 4  # rows on which the merge is checked


@dataclass(frozen=True)
class Plan:
    """What a run found out at its start and keeps. `micro_batch` is the number of rows a process computes at once."""

    dtype: str
    threads: int
    micro_batch: int


def train(
    base_dir: Path,
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    settings: TrainSettings,
    checkpoints_dir: Path,
    out: Path,
    on_progress: Progress = no_progress,
    *,
    is_ordered: bool = False,
    validation: Sequence[Row] = (),
    device: str = "auto",
    say: Callable[[str], None] = lambda _: None,
) -> TrainReport:
    """Train the checkpoint in base_dir on rows and save it, merged, to out; go on from the last whole checkpoint.

    With `is_ordered` the rows are those of every epoch, in order (a curriculum's). An adapter is left in
    `out/../adapter`, the curve in `checkpoints_dir/../curve.jsonl`.

    Raises:
        ModelError: the weights cannot be loaded, do not fit the rows or the memory, or the loss diverges.
        ArtifactError: the disk is full.
    """
    where = choose_device(device)
    ordered = list(rows) if is_ordered else order_rows(rows, settings.batch_size, settings.epochs, settings.seed)
    with _disk_errors(checkpoints_dir):
        plan = _plan(base_dir, rows, settings, where, checkpoints_dir)
        _same_rows(ordered, checkpoints_dir)
        while True:
            try:
                report = _run(
                    base_dir, ordered, tokenizer, settings, plan, where, checkpoints_dir, out, on_progress, validation
                )
                break
            except (RuntimeError, MemoryError) as error:
                is_memory = isinstance(error, MemoryError) or NO_MEMORY.search(str(error))
                if not is_memory or processes() > 1:  # the other processes would wait for this one
                    raise
                plan = _smaller(plan, settings, checkpoints_dir, say)
            _make_room(where)
        if settings.full or not is_first():
            return report
        _make_room(where)  # what was trained lies in the adapter's folder
        difference = merge_adapter(out.with_name("adapter"), base_dir, tokenizer, out, ordered[:_N_CHECKED])
        return replace(report, merge_error=difference)


def _make_room(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _run(
    base_dir: Path,
    ordered: Sequence[Row],
    tokenizer: Tokenizer,
    settings: TrainSettings,
    plan: Plan,
    device: torch.device,
    checkpoints_dir: Path,
    out: Path,
    on_progress: Progress,
    validation: Sequence[Row],
) -> TrainReport:
    dtype = torch.bfloat16 if plan.dtype == "bf16" else torch.float32
    with _threads(plan.threads):
        model = load_student(base_dir, settings, device, dtype)
        check_vocabulary(model, [*ordered, *validation], len(tokenizer))
        objective = Objective(model, max(len(row.input_ids) for row in [*ordered, *validation]))
        collate = objective.collator(tokenizer.pad_token_id)
        validate = _validation(objective, model, collate, validation, plan.micro_batch)
        share = _computed_share(ordered, collate, plan.micro_batch)
        # scoring a row is a third of training it: so it takes a tenth of the time at most
        clock = Clock(settings, ordered, share, validate, on_progress, rows_between=3 * len(validation))
        # The fast pass holds its weights in the plan's format already; any other computes under autocast.
        autocast = objective.pass_ != "fast" and dtype == torch.bfloat16
        trainer = StudentTrainer(
            settings,
            objective,
            clock,
            model=model,
            args=arguments(settings, str(checkpoints_dir), device, plan.micro_batch, autocast, len(ordered)),
            train_dataset=ordered,
            data_collator=collate,
        )
        n_steps = _train(trainer, clock, last_checkpoint(checkpoints_dir))
        objective.release()
        gathered = trainer.gathered_weights()
        if is_first() and settings.full:
            whole = model if gathered is None else _put_together(gathered, base_dir)
            save_checkpoint(whole, base_dir, tokenizer, out)
        elif is_first():
            save_adapter(model, base_dir, out.with_name("adapter"), gathered)
        return TrainReport(**clock.summary(n_steps), pass_=objective.pass_, **asdict(plan))


def _put_together(weights: dict[str, Any], base_dir: Path) -> Any:
    """Return the base with the trained weights, of which every process held a part."""
    model = load_base(base_dir, torch.float32)
    model.load_state_dict(weights)
    return model


def _train(trainer: StudentTrainer, clock: Clock, checkpoint: str | None) -> int:
    """Train to the end, from the checkpoint if there is one; return the number of steps.

    A run that ended early, because held-out rows got no better, leaves the weights with which they were best.
    """
    n_steps = clock.resume(Path(checkpoint)) if checkpoint else None
    if n_steps is None:
        trainer.train(resume_from_checkpoint=checkpoint)
        n_steps, checkpoint = int(trainer.state.global_step), None
    if clock.stopped == "early":
        checkpoint = clock.best_checkpoint(Path(str(trainer.args.output_dir)))
    if checkpoint:
        trainer._load_from_checkpoint(str(checkpoint))
    return n_steps


def _validation(
    objective: Objective,
    model: Any,
    collate: Callable[[Sequence[Row]], dict[str, Any]],
    rows: Sequence[Row],
    n_at_once: int,
) -> Callable[[], Validation] | None:
    """Return what scores the held-out rows; None if there are none."""
    if not rows:
        return None
    batches = [Batch(**collate(rows[i : i + n_at_once])) for i in range(0, len(rows), n_at_once)]

    def validate() -> Validation:
        was_training = model.training
        model.eval()
        try:
            return validation_of(objective.scores, batches)
        finally:
            model.train(was_training)

    return validate


def _computed_share(
    ordered: Sequence[Row], collate: Callable[[Sequence[Row]], dict[str, Any]], n_at_once: int
) -> float:
    """Return which share of the rows' tokens is computed, from a few batches; above 1 where there is padding."""
    computed = given = 0
    for start in range(0, min(len(ordered), 16 * n_at_once), n_at_once):
        batch = collate(ordered[start : start + n_at_once])
        computed += batch["input_ids"].numel()
        given += batch["n_tokens"]
    return computed / max(given, 1)


def _plan(base_dir: Path, rows: Sequence[Row], settings: TrainSettings, device: torch.device, folder: Path) -> Plan:
    """Return the plan that the run began with, or make it."""
    path = folder / _PLAN_FILE
    share, left = divmod(settings.batch_size, processes())
    if left or not share:
        raise UsageError(
            f"{processes()} processes cannot share the {settings.batch_size} rows of a step", "give --train-batch-size"
        )
    if not is_first():
        _wait_for(path)  # the first process decides for all
    if path.exists():
        plan = Plan(**json.loads(path.read_text(encoding="utf-8")))
        return replace(plan, micro_batch=_divisor(share, plan.micro_batch))  # there may be more processes now
    config = json.loads((base_dir / "config.json").read_text(encoding="utf-8"))
    text = config.get("text_config", config)
    width, inner = text.get("hidden_size", 512), text.get("intermediate_size") or 4 * text.get("hidden_size", 512)
    choice = fastest(width, inner, device)
    is_small = sum(file.stat().st_size for file in base_dir.glob("*.safetensors")) < 2 * SMALL_MODEL
    kind = settings.dtype or ("fp32" if is_small or choice.dtype == torch.float32 else "bf16")
    at_once = settings.micro_batch or _fitting(text, rows, share, device)
    plan = Plan(kind, settings.threads or choice.threads, _divisor(share, at_once))
    folder.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(asdict(plan)) + "\n")
    return plan


def _same_rows(ordered: Sequence[Row], folder: Path) -> None:
    """Remember which rows this training takes; with others a checkpoint would go on at the wrong place.

    Raises:
        ArtifactError: they are others than when it began.
    """
    if not is_first():
        return
    digests: dict[int, bytes] = {}  # a row comes in every pass
    whole = hashlib.sha256()
    for row in ordered:
        if id(row) not in digests:
            digests[id(row)] = hashlib.sha256(repr((list(row.input_ids), row.n_prompt)).encode()).digest()
        whole.update(digests[id(row)])
    path = folder / _ROWS_FILE
    if path.exists() and path.read_text(encoding="utf-8").strip() != whole.hexdigest() and last_checkpoint(folder):
        raise ArtifactError(
            f"the rows are others than when the training in {folder} began", f"delete {folder} to train anew on these"
        )
    write_text(path, whole.hexdigest() + "\n")


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + 600
    while not path.exists():
        if time.monotonic() > deadline:
            raise ArtifactError(f"the first process has not written {path} in ten minutes")
        time.sleep(0.1)


def _divisor(share: int, most: int) -> int:
    """Return the most rows at once that a process's share of a step is a multiple of."""
    return next(n for n in range(min(share, most), 0, -1) if share % n == 0)


def _fitting(config: dict[str, Any], rows: Sequence[Row], share: int, device: torch.device) -> int:
    """Return how many rows of a share fit the memory at once, by a rule with room to spare."""
    width, inner = config.get("hidden_size", 512), config.get("intermediate_size") or 4 * config.get("hidden_size", 512)
    longest = max(len(row.input_ids) for row in rows)
    # what the passes keep of a token and layer: twelve states as wide as the stream, four as the MLP, in fp32 at worst
    of_a_row = longest * config.get("num_hidden_layers", 32) * (12 * width + 4 * inner) * 4
    on_gpu = device.type == "cuda"
    free = torch.cuda.mem_get_info(device)[0] if on_gpu else psutil.virtual_memory().available
    return max(1, min(share, int(0.5 * free / of_a_row)))


def _smaller(plan: Plan, settings: TrainSettings, folder: Path, say: Callable[[str], None]) -> Plan:
    """Return the plan with half the rows at once, or less; a step still takes as many in all.

    Raises:
        ModelError: it is one row already.
    """
    if plan.micro_batch == 1:
        raise ModelError(
            "not even one row at a time fits the memory", "give a smaller --max-length, or train an adapter, not --full"
        )
    smaller = replace(plan, micro_batch=_divisor(settings.batch_size // processes(), plan.micro_batch // 2))
    write_text(folder / _PLAN_FILE, json.dumps(asdict(smaller)) + "\n")
    say(f"{plan.micro_batch} rows at once do not fit the memory: {smaller.micro_batch} from here on, as many a step")
    return smaller


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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
