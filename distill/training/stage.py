"""The first training of a run: the kept traces become rows, and the student trains on them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from ...localrun.core.reporter import Progress, Relay
from ..recipe import TeachSettings, Work
from ..records import Trace
from ..run import Run
from ..tokenizer import Tokenizer
from .distributed import everywhere
from .student import teach_template

if TYPE_CHECKING:
    from .rows import Row


def check_training(base: Path, settings: TeachSettings, device: str) -> None:
    """See that the student can be taught with these settings: nothing is paid for one that cannot.

    Raises:
        UsageError: settings that do not go together, or a tracker that is not there.
        ModelError: a chat template that cannot be taught to think, or no way to 4 bits.
    """
    from ..device import choose_device
    from .lora import four_bits
    from .report import TrainSettings
    from .rows import make_row
    from .trainer import reporters

    training = TrainSettings(**settings.stage_training())
    reporters(training.report_to)
    if training.qlora:
        four_bits(choose_device(device))
    make_row(tokenizer_of(base), [{"role": "user", "content": "1 + 1?"}], "1 + 1 = 2", "2")


def train_first(
    run: Run,
    base: Path,
    traces: list[Trace],
    traces_path: Path,
    rates: dict[str, float],
    settings: TeachSettings,
    work: Work,
    on_progress: Progress,
) -> list[Row]:
    """Train the student on the kept traces unless the folder holds it already; return the rows, for rounds."""
    out = run.first_student_dir(settings.rounds)
    if run.student_dir.exists():
        return []
    from .dataset import by_level, hold_out, lessons
    from .report import TrainSettings
    from .rows import order_rows
    from .train import TrainPaths, train

    training = TrainSettings(**settings.stage_training(), seed=settings.seed)
    tokenizer = tokenizer_of(base)
    rows, kept = lessons(
        traces,
        traces_path,
        tokenizer,
        max_length=training.max_length,
        loss=settings.loss,
        logit_share=settings.logit_share,
        work=work,
        weights={"reasoning_weight": training.reasoning_weight, "answer_weight": training.answer_weight},
        too_long=training.too_long,
    )
    trained, validation = hold_out(rows, kept, training.n_validation, settings.seed)
    if out.exists():
        return rows
    if not run.is_trained:
        record = run.load("curation.json")
        record["dropped"]["too_long"] = len(traces) - len(rows)
        record["kept"] = len(rows)
        run.save("curation.json", record)
    out.parent.mkdir(parents=True, exist_ok=True)
    ordered = [rows[i] for i in trained]
    if settings.curriculum:
        asked = [kept[i] for i in trained]
        if not any(trace.problem_id in rates for trace in asked):
            work.say("no problem of the traces could be tried: their order is the plain one, without a curriculum")
        ordered = by_level(ordered, asked, rates, training.batch_size, training.epochs, settings.seed)
    else:
        ordered = order_rows(ordered, training.batch_size, epochs=training.epochs, seed=training.seed)
    result = everywhere(
        train,
        TrainPaths(base, run.checkpoints_dir, out),
        ordered,
        tokenizer=tokenizer,
        settings=training,
        validation=validation,
        device=work.device,
        own={"report": Relay(on_progress, work.say)},
    )
    run.save("training.json", dataclasses.asdict(result))
    return rows


def tokenizer_of(base: Path) -> Tokenizer:
    """Return the student's tokenizer, its template taught to think."""
    from ..teachers.huggingface.loading import load_tokenizer

    tokenizer = load_tokenizer(base)
    teach_template(tokenizer)
    return tokenizer
