"""The first training of a run: the kept traces become rows, and the student trains on them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from ..context import Context
from ..records import Trace
from ..tokenizer import Tokenizer
from .distributed import everywhere
from .student import teach_template

if TYPE_CHECKING:
    from .rows import Row


def check_training(context: Context, base: Path) -> None:
    """Check that the student can be taught with these settings, before anything is paid for.

    Raises:
        UsageError: settings that do not go together, or a tracker that is not installed.
        ModelError: a chat template that cannot be taught to think, or no way to 4 bits.
    """
    from ..device import choose_device
    from .lora import four_bits
    from .rows import make_row
    from .trainer import reporters

    training = context.recipe.training
    reporters(training.report_to)
    if training.is_qlora:
        four_bits(choose_device(context.resources.device))
    make_row(tokenizer_of(base), [{"role": "user", "content": "1 + 1?"}], reasoning="1 + 1 = 2", content="2")


def train_first(
    context: Context, base: Path, *, traces: list[Trace], traces_path: Path, rates: dict[str, float]
) -> list[Row]:
    """Train the student on the kept traces unless the folder holds it already; return the rows, for rounds."""
    run, recipe = context.run, context.recipe
    out = run.first_student_dir(recipe.on_policy.rounds)
    if run.student_dir.exists():
        return []
    from .dataset import by_level, hold_out, lessons
    from .rows import order_rows
    from .train import TrainPaths, train

    training = recipe.one_training()
    tokenizer = tokenizer_of(base)
    rows, kept = lessons(traces, traces_path, tokenizer=tokenizer, training=training, report=context.report)
    trained, validation = hold_out(rows, kept, n=training.n_validation, seed=recipe.seed)
    if out.exists():
        return rows
    if not run.is_trained:
        record = run.load("curation.json")
        record["dropped"]["too_long"] = len(traces) - len(rows)
        record["kept"] = len(rows)
        run.save("curation.json", record)
    out.parent.mkdir(parents=True, exist_ok=True)
    ordered = [rows[i] for i in trained]
    if training.curriculum.enabled:
        asked = [kept[i] for i in trained]
        if not any(trace.problem_id in rates for trace in asked):
            context.report.say("no problem of the traces could be tried: they keep their order, without a curriculum")
        ordered = by_level(ordered, asked, rates=rates, training=training)
    else:
        ordered = order_rows(ordered, training.batch_size, epochs=training.epochs, seed=training.seed or 0)
    result = everywhere(
        train,
        TrainPaths(base, run.checkpoints_dir, out),
        ordered,
        tokenizer=tokenizer,
        settings=training,
        validation=validation,
        device=context.resources.device,
        own={"report": context.report},
    )
    run.save("training.json", dataclasses.asdict(result))
    return rows


def tokenizer_of(base: Path) -> Tokenizer:
    """Return the student's tokenizer, its template taught to think."""
    from ..teachers.huggingface.loading import load_tokenizer

    tokenizer = load_tokenizer(base)
    teach_template(tokenizer)
    return tokenizer
