"""The first training of a run: the kept traces become rows, and the student trains on them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from ..context import Context
from ..problems.instruction import shared_system
from ..records import Trace
from ..tokenizer import Tokenizer
from .distributed import everywhere
from .student import teach_template

if TYPE_CHECKING:
    from .rows import Row


def check_training(context: Context, base: Path) -> None:
    """Check that the student can be trained with these settings, before anything is paid for.

    Raises:
        UsageError: `code` "no-such-tracker" or "not-installed": a tracker is unknown or missing.
        ModelError: the chat template has no room for reasoning, or there is no way to 4 bits here.
    """
    from ..device import choose_device
    from .lora import four_bits
    from .rows import make_row
    from .trainer import reporters

    training = context.recipe.training
    reporters(training.report_to)
    if training.weights == "qlora":
        four_bits(choose_device(context.resources.device))
    make_row(tokenizer_of(base), [{"role": "user", "content": "1 + 1?"}], reasoning="1 + 1 = 2", content="2")


def train_first(
    context: Context, base: Path, *, traces: list[Trace], traces_path: Path, rates: dict[str, float]
) -> list[Row]:
    """Train the student on the kept traces unless the folder holds it already; return the rows, for rounds."""
    run, recipe = context.run, context.recipe
    if run.student_dir.exists():
        return []
    from .dataset import hold_out, lessons
    from .train import TrainPaths, train

    out = run.first_student_dir(recipe.on_policy.rounds)
    training, tokenizer = recipe.one_training(), tokenizer_of(base, shared_system(t.messages for t in traces))
    rows, kept = lessons(traces, traces_path, tokenizer=tokenizer, training=training, report=context.report)
    trained, validation = hold_out(rows, kept, n=training.n_validation, seed=recipe.seed)
    if out.exists():
        return rows
    _count_too_long(context, n_traces=len(traces), n_rows=len(rows))
    out.parent.mkdir(parents=True, exist_ok=True)
    result = everywhere(
        train,
        TrainPaths(base, run.checkpoints_dir, out),
        _ordered(context, [rows[i] for i in trained], traces=[kept[i] for i in trained], rates=rates),
        tokenizer=tokenizer,
        settings=training,
        validation=validation,
        device=context.resources.device,
        first_only={"report": context.report},
    )
    run.save("training.json", dataclasses.asdict(result))
    return rows


def _count_too_long(context: Context, *, n_traces: int, n_rows: int) -> None:
    """Add the traces that were too long to train on to curation.json, once."""
    run = context.run
    if not run.is_trained:
        record = run.load("curation.json")
        record["dropped"]["too_long"] = n_traces - n_rows
        record["kept"] = n_rows
        run.save("curation.json", record)


def _ordered(context: Context, rows: list[Row], *, traces: list[Trace], rates: dict[str, float]) -> list[Row]:
    """Return the rows of every epoch in the order in which they train, by the curriculum if the recipe has one."""
    from .curriculum import arrange, estimated
    from .rows import order_rows

    training = context.recipe.one_training()
    if not training.curriculum.enabled:
        return order_rows(rows, training.batch_size, epochs=training.epochs, seed=training.seed or 0)
    if not any(trace.problem_id in rates for trace in traces):
        context.report.say("the student could try no problem of the traces: they train in plain order")
    tried = [(row, rates.get(trace.problem_id)) for row, trace in zip(rows, traces, strict=True)]
    return arrange(estimated(tried), training)


def tokenizer_of(base: Path, system: str = "") -> Tokenizer:
    """Return the student's tokenizer, with a chat template that renders reasoning.

    A conversation without a system turn begins with `system`: what all training rows begin with, a chat does too.
    """
    from ..teachers.huggingface.loading import load_tokenizer

    tokenizer = load_tokenizer(base)
    teach_template(tokenizer, system)
    return tokenizer
