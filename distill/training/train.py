"""Train a student on rows, from the first step or the last checkpoint, to a plain checkpoint on disk.

`transformers.Trainer` runs the loop (`trainer`), each row names its losses (`losses`), the states come from the fastest
pass that is exact (`objective`), and measurements made at the start are kept for a resume (`step_plan`).
"""

from __future__ import annotations

import gc
import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ...errors import ArtifactError
from ...localrun.core.atomic import write_text
from ...localrun.core.reporter import SILENT, Reporter
from ..device import NO_MEMORY, choose_device
from ..recipe.training import TrainingRecipe
from ..tokenizer import Tokenizer
from .callback import Clock, Validation, last_checkpoint, validation_of
from .distributed import is_first, processes
from .lora import check_vocabulary, load_base, load_student
from .merge import merge_adapter, save_adapter, save_checkpoint
from .newest_answer import Question
from .objective import Objective
from .packing import Batch
from .rows import Row
from .step_plan import StepPlan, make_plan
from .trainer import StudentTrainer, arguments

# how torch and safetensors report a full disk
_DISK_FULL = re.compile(r"No space left|File too large|inline_container|PytorchStreamWriter|os error")
_ROWS_FILE = "rows.sha256"
_N_CHECKED = 4  # rows on which the merge is checked

_Collate = Callable[[Sequence[Row]], dict[str, Any]]


@dataclass(frozen=True)
class TrainPaths:
    """The checkpoint that a training starts from, and where it writes.

    The adapter goes to `out/../adapter`, the curve to `checkpoints_dir/../curve.jsonl`.
    """

    base_dir: Path
    checkpoints_dir: Path
    out: Path

    @property
    def adapter_dir(self) -> Path:
        """The folder of the adapter alone."""
        return self.out.with_name("adapter")


@dataclass(frozen=True)
class TrainReport:
    """The result of a training. `tokens_per_s` counts every token of the rows, prompts included, without padding.

    `computed_tokens_per_s` counts a beginning that rows share only once, as it is computed. `stopped` is `end`, `time`
    or `early`. `pass_` names the way in which states were computed (see `objective`). The validation's loss is
    cross-entropy, its accuracy the share of target tokens that are the student's first choice after the correct tokens
    before them. `merge_error` is the largest difference between the logits of the merged student and those of base and
    adapter, in fp32, as a share of the largest logit.
    """

    steps: int
    rows: int
    tokens: int
    minutes: float
    tokens_per_s: float
    computed_tokens_per_s: float
    final_loss: float
    stopped: str
    pass_: str
    dtype: str
    threads: int
    micro_batch: int
    validation_loss: float | None = None
    validation_accuracy: float | None = None
    merge_error: float | None = None


def train(
    paths: TrainPaths,
    rows: Sequence[Row],
    *,
    tokenizer: Tokenizer,
    settings: TrainingRecipe,
    validation: Sequence[Row] = (),
    device: str = "auto",
    report: Reporter = SILENT,
) -> TrainReport:
    """Train a checkpoint on the rows, which are those of every epoch in order, and save the merged result.

    It resumes from the last whole checkpoint. `rows.order_rows` and `curriculum.arrange` make the order.

    Raises:
        ModelError: the weights cannot be loaded or do not fit the rows or the memory, or the loss diverges.
        ArtifactError: `code` "write-failed": the disk is full; "other-rows": the checkpoints are of other rows.
    """
    training = _Training(paths, rows, validation, tokenizer, settings, choose_device(device), report)
    folder = paths.checkpoints_dir
    with _disk_errors(folder):
        plan = make_plan(paths.base_dir, rows, settings=settings, device=training.device, folder=folder)
        _check_same_rows(rows, folder)
        result = training.run_fitting(plan)
        if settings.weights == "full" or not is_first():
            return result
        _free_memory(training.device)  # the trained weights are in the adapter's folder
        difference = merge_adapter(
            paths.adapter_dir, paths.base_dir, tokenizer=tokenizer, out=paths.out, rows=rows[:_N_CHECKED]
        )
        return replace(result, merge_error=difference)


@dataclass(frozen=True)
class _Training:
    """One training and everything that it was given."""

    paths: TrainPaths
    rows: Sequence[Row]
    validation: Sequence[Row]
    tokenizer: Tokenizer
    settings: TrainingRecipe
    device: torch.device
    report: Reporter

    def run_fitting(self, plan: StepPlan) -> TrainReport:
        """Train to the end, from the last checkpoint with half the rows at once whenever the memory is too small.

        Raises:
            ModelError: `code` "model-too-large": not even one row at a time fits.
        """
        while True:
            try:
                return self.run(plan)
            except (RuntimeError, MemoryError) as error:
                is_memory = isinstance(error, MemoryError) or NO_MEMORY.search(str(error))
                if not is_memory or processes() > 1:  # the other processes would wait for this one
                    raise
                n, plan = plan.micro_batch, plan.smaller(self.settings, self.paths.checkpoints_dir)
                self.report.say(f"{n} rows at once do not fit the memory: from here on {plan.micro_batch} at a time")
            _free_memory(self.device)  # only here: until the handler ends, the error's traceback holds the tensors

    def run(self, plan: StepPlan) -> TrainReport:
        """Train to the end and save the adapter, or all weights if they train."""
        paths, settings, dtype = self.paths, self.settings, plan.torch_dtype
        with _threads(plan.threads):
            model = load_student(paths.base_dir, settings, device=self.device, dtype=dtype)
            everything = [*self.rows, *self.validation]
            check_vocabulary(model, everything, len(self.tokenizer))
            objective = Objective(model, max(len(row.input_ids) for row in everything))
            collate = objective.collator(self.tokenizer.pad_token_id)
            with closing(self._clock(objective, model, collate=collate, n_at_once=plan.micro_batch)) as clock:
                trainer = StudentTrainer(
                    settings,
                    clock,
                    model=model,
                    args=arguments(
                        settings,
                        paths.checkpoints_dir,
                        device=self.device,
                        micro_batch=plan.micro_batch,
                        # The fast pass holds its weights in the plan's format already; the others need autocast.
                        autocast=objective.pass_ != "fast" and dtype == torch.bfloat16,
                        n_rows=len(self.rows),
                    ),
                    train_dataset=self.rows,
                    data_collator=collate,
                )
                n_steps = _run_trainer(trainer, clock, last_checkpoint(paths.checkpoints_dir))
            objective.release()
            self._save(model, trainer.gathered_weights())
            return TrainReport(**clock.summary(n_steps), pass_=objective.pass_, **asdict(plan))

    def _clock(self, objective: Objective, model: Any, *, collate: _Collate, n_at_once: int) -> Clock:
        rows, held_out = self.rows, self.validation
        # A sharded student is in no process as a whole.
        asked = Question(objective.causal_lm, held_out[0], tokenizer=self.tokenizer) if self._can_ask() else None
        batches = [Batch(**collate(held_out[i : i + n_at_once])) for i in range(0, len(held_out), n_at_once)]

        def validate() -> Validation:
            was_training = model.training
            model.eval()
            try:
                found = validation_of(objective.scores, batches)
                return replace(found, answer=asked.ask()) if asked else found
            finally:
                model.train(was_training)

        return Clock(
            self.settings,
            rows,
            computed_share=_computed_share(rows, collate, n_at_once),
            validate=validate if batches else None,
            # scoring a row takes a third of the time of training on it, so validation takes at most a tenth in all
            rows_between=3 * len(held_out),
            report=self.report,
        )

    def _can_ask(self) -> bool:
        return bool(self.validation) and processes() == 1

    def _save(self, model: Any, gathered: dict[str, Any] | None) -> None:
        """Write the trained weights; `gathered` has all of them if each process holds a part."""
        if not is_first():
            return
        if self.settings.weights != "full":
            save_adapter(model, self.paths.base_dir, folder=self.paths.adapter_dir, weights=gathered)
            return
        if gathered is not None:
            model = load_base(self.paths.base_dir, torch.float32)
            model.load_state_dict(gathered)
        save_checkpoint(model, self.paths.base_dir, tokenizer=self.tokenizer, out=self.paths.out)


def _run_trainer(trainer: StudentTrainer, clock: Clock, checkpoint: str | None) -> int:
    """Train to the end, from the checkpoint if there is one; return the number of steps.

    If the training stopped early, because held-out rows no longer improved, the model has its best weights.
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


def _computed_share(rows: Sequence[Row], collate: _Collate, n_at_once: int) -> float:
    """Estimate from a few batches which share of the rows' tokens is computed; padding makes it more than 1."""
    computed = given = 0
    for start in range(0, min(len(rows), 16 * n_at_once), n_at_once):
        batch = collate(rows[start : start + n_at_once])
        computed += batch["input_ids"].numel()
        given += batch["n_tokens"]
    return computed / max(given, 1)


def _check_same_rows(rows: Sequence[Row], folder: Path) -> None:
    """Remember the rows of a training: with other rows, a checkpoint would resume at the wrong place.

    Raises:
        ArtifactError: `code` "other-rows": the training began with others.
    """
    if not is_first():
        return
    digests: dict[int, bytes] = {}  # by the row's id: the same object comes in every epoch
    whole = hashlib.sha256()
    for row in rows:
        if id(row) not in digests:
            digests[id(row)] = hashlib.sha256(repr((list(row.input_ids), row.n_prompt)).encode()).digest()
        whole.update(digests[id(row)])
    path = folder / _ROWS_FILE
    if path.exists() and path.read_text(encoding="utf-8").strip() != whole.hexdigest() and last_checkpoint(folder):
        raise ArtifactError(
            f"the training in {folder} began with other rows",
            f"delete {folder} to start the training again with these",
            code="other-rows",
        )
    write_text(path, whole.hexdigest() + "\n")


def _free_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


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
    """Translate the errors that Python, torch and safetensors raise on a full or unwritable disk."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        text = str(error)
        if not isinstance(error, OSError) and not _DISK_FULL.search(text):
            raise
        reason = text if isinstance(error, OSError) else "the disk is full, or files may not grow so large"
        raise ArtifactError(
            f"cannot write in {folder.parent}: {reason}",
            "free some disk space; the same command resumes from the last whole checkpoint",
            code="write-failed",
        ) from error
