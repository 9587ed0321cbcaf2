"""The course of a training: its time, its curve, its checkpoints and validations, and when it has to end."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from ...errors import ModelError
from ...localrun.core.atomic import write_text
from ...localrun.core.record_log import RecordLog, read_records, to_json
from ...localrun.core.reporter import SILENT, Reporter
from ...localrun.core.text import sparkline
from ..recipe.training import TrainingRecipe
from ..records import CURVE_FILE, CurvePoint
from ..run import CLOCK_FILE
from .distributed import shared
from .packing import Batch
from .rows import Row

_WINDOW = 20  # steps whose mean loss is watched
_DIVERGED = 2.0  # a mean loss of so many times the lowest one so far, and half a nat more, has diverged
_N_VALIDATIONS = 20  # in a training, at most
_N_MEANS = 12  # of the loss, in the note


@dataclass(frozen=True)
class Validation:
    """Cross-entropy over the held-out rows' targets, and the share of them that is the student's first choice.

    `answer` says what the student answers to one of them now; it may be empty.
    """

    loss: float
    accuracy: float
    answer: str = ""


class Clock(TrainerCallback):
    """Knows how far the training is, by time if `minutes` limits it; validates, saves, stops, and draws the curve.

    Raises in the loop:
        ModelError: `code` "loss-not-finite" or "loss-diverged".
    """

    def __init__(
        self,
        settings: TrainingRecipe,
        rows: Sequence[Row],
        *,
        computed_share: float = 1.0,
        validate: Callable[[], Validation] | None = None,
        rows_between: int = 0,
        report: Reporter = SILENT,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take the rows of every step, in order.

        computed_share: which share of their tokens is computed, as a beginning that rows share counts once.
        rows_between: rows that train between two validations, at least. now: the time in seconds.
        """
        self._settings, self._report, self._validate, self._now = settings, report, validate, now
        self._tokens = [0]
        for row in rows:
            self._tokens.append(self._tokens[-1] + len(row.input_ids))
        self._computed_share, self._rows_between = computed_share, rows_between
        self._before = 0.0  # seconds of training before this process
        self._started = self._saved = now()
        self._losses: list[float] = []
        self._means, self._every, self._part = list[float](), 1, list[float]()  # of the loss, for the note
        self._lowest = math.inf  # mean loss of a window
        self._validations: list[tuple[float, Validation]] = []  # with how much of the training was done
        self._validated_rows = 0  # rows that had trained at the last validation
        self._best: int | None = None  # the step of the best validation, whose checkpoint is kept
        self._curve: RecordLog[CurvePoint] | None = None  # in the first process
        self.stopped = "end"

    def seconds(self) -> float:
        """Return how long this student has trained, earlier processes included."""
        return self._before + self._now() - self._started

    def progress(self, steps_done: float) -> float:
        """Return how much of the training is done, 0 to 1: by steps, or by time where that is ahead."""
        if self._settings.minutes is None:
            return steps_done
        return shared(min(1.0, max(steps_done, self.seconds() / (60 * self._settings.minutes))))

    def tokens(self, steps: int) -> int:
        """Return the number of tokens in the rows of the first steps."""
        return self._tokens[self.rows(steps)]

    def rows(self, steps: int) -> int:
        """Return the number of rows of the first steps."""
        return min(steps * self._settings.batch_size, len(self._tokens) - 1)

    def _tokens_per_s(self, steps: int) -> float:
        return self.tokens(steps) / max(self.seconds(), 1e-9)

    def summary(self, steps: int) -> dict[str, Any]:
        """Return the figures of the training under the names of `TrainReport`."""
        last = self._losses[-_WINDOW:]
        rate = self._tokens_per_s(steps)
        found = self._validations[-1][1] if self._validations else None
        if self.stopped == "early":
            found = min((each for _, each in self._validations), key=lambda each: each.loss)
        return {
            "steps": steps,
            "rows": self.rows(steps),
            "tokens": self.tokens(steps),
            "minutes": round(self.seconds() / 60, 2),
            "tokens_per_s": round(rate, 1),
            "computed_tokens_per_s": round(rate * self._computed_share, 1),
            "final_loss": round(sum(last) / len(last), 4) if last else 0.0,
            "stopped": self.stopped,
            "validation_loss": round(found.loss, 4) if found else None,
            "validation_accuracy": round(found.accuracy, 4) if found else None,
        }

    def resume(self, checkpoint: Path) -> int | None:
        """Resume from a checkpoint; return its number of steps if the training had ended there, else None."""
        kept = json.loads((checkpoint / CLOCK_FILE).read_text(encoding="utf-8"))
        self._before, self._lowest, self._losses = kept["seconds"], kept["lowest"], kept["losses"]
        self._validations = [(done, Validation(*found)) for done, found in kept["validations"]]
        self._validated_rows, self.stopped, self._best = kept["validated_rows"], kept["stopped"], kept.get("best")
        return int(checkpoint.name.split("-")[1]) if kept["ended"] == self._ends() else None

    def _ends(self) -> list[float | None]:
        """Return what decides when the training ends: a checkpoint of other limits may have to go further."""
        return [len(self._tokens) - 1, self._settings.steps, self._settings.minutes]

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the time, and the curve at the checkpoint's step."""
        if state.is_world_process_zero:
            path = Path(args.output_dir).parent / CURVE_FILE
            cut_curve(path, state.global_step)
            self._curve = RecordLog(path, CurvePoint)
        self._started = self._saved = self._now()

    def close(self) -> None:
        """Close the curve's file. More than one call does no harm."""
        if self._curve is not None:
            self._curve.close()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Validate, stop and save if it is time to, and report how far the training is."""
        done = self.progress(state.global_step / state.max_steps)
        if done >= 1:
            control.should_training_stop = True
            self.stopped = "time" if self._settings.minutes and state.global_step < state.max_steps else "end"
        self._maybe_validate(done, state.global_step, control)
        if shared(self._now() - self._saved) >= self._settings.save_every_s or control.should_training_stop:
            control.should_save = True
            self._saved = self._now()
        self._report.progress("training", done, total=1.0, note=self._note(state.global_step))

    def _note(self, step: int) -> str:
        """Return what a person may want to know, the most telling first: a narrow terminal cuts the rest."""
        notes = [f"step {step}"]
        if self._losses:
            notes.append(f"loss {sparkline(self._means)} {self._losses[-1]:.2f}")
        if self._validations:
            found = self._validations[-1][1]
            notes += [f"held out {100 * found.accuracy:.0f} %", *([found.answer] if found.answer else [])]
        return ", ".join([*notes, f"{self._tokens_per_s(step):.0f} tokens/s"])

    def _remember(self, loss: float) -> None:
        """Add a loss to the means of equally many steps, which are halved where they become too many."""
        self._part.append(loss)
        if len(self._part) == self._every:
            self._means.append(sum(self._part) / self._every)
            self._part = []
        if len(self._means) == 2 * _N_MEANS:
            self._means = [(a + b) / 2 for a, b in zip(self._means[::2], self._means[1::2], strict=True)]
            self._every *= 2

    def on_log(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Add a point to the curve, and stop if the loss is not finite or diverges."""
        logs = others.get("logs") or {}
        if "loss" not in logs:
            return
        loss, step = float(logs["loss"]), state.global_step
        self._losses = [*self._losses[-_WINDOW + 1 :], loss]
        self._remember(loss)
        mean = sum(self._losses) / len(self._losses)
        if not math.isfinite(loss):
            raise self._broken(args.output_dir, f"the loss is {loss} after step {step}", "loss-not-finite")
        if len(self._losses) == _WINDOW:
            if mean > _DIVERGED * self._lowest + 0.5:
                what = f"the loss diverges: its mean was {self._lowest:.3f} at best and is {mean:.3f} now"
                raise self._broken(args.output_dir, what, "loss-diverged")
            self._lowest = min(self._lowest, mean)
        rate, seconds = round(self._tokens_per_s(step), 1), round(self.seconds(), 3)
        self._draw(CurvePoint(step, seconds, loss, lr=logs["learning_rate"], tokens_per_s=rate))

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Finish a checkpoint, and delete all but the two newest and the one of the best validation."""
        if not state.is_world_process_zero:
            return
        kept = {
            "seconds": self.seconds(),
            "lowest": self._lowest,
            "losses": self._losses,
            "validations": [(done, (found.loss, found.accuracy, found.answer)) for done, found in self._validations],
            "validated_rows": self._validated_rows,
            "stopped": self.stopped,
            "best": self._best,
            "ended": self._ends() if control.should_training_stop else None,
        }
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        write_text(folder / CLOCK_FILE, json.dumps(kept))
        for older in checkpoints(Path(args.output_dir))[:-2]:
            if older.name != f"checkpoint-{self._best}":
                shutil.rmtree(older, ignore_errors=True)

    def best_checkpoint(self, folder: Path) -> str | None:
        """Return the checkpoint of the best validation; None if there is none."""
        path = folder / f"checkpoint-{self._best}"
        return str(path) if (path / CLOCK_FILE).exists() else None

    def _maybe_validate(self, done: float, step: int, control: Any) -> None:
        """Score the held-out rows after every twentieth of the training, and stop where they no longer improve."""
        n_rows = self.rows(step)
        last = self._validations[-1][0] if self._validations else 0.0
        is_early = done - last < 1 / _N_VALIDATIONS or n_rows - self._validated_rows < self._rows_between
        if self._validate is None or (is_early and done < 1):
            return
        self._validated_rows = n_rows
        found = self._validate()
        self._validations.append((done, found))
        loss, accuracy = round(found.loss, 5), round(found.accuracy, 5)
        self._draw(CurvePoint(step, validation_loss=loss, validation_accuracy=accuracy))
        losses = [each.loss for _, each in self._validations]
        patience = self._settings.patience
        if patience and losses[-1] == min(losses):
            self._best, control.should_save = step, True
        if done < 1 and patience and len(losses) > patience and min(losses[-patience:]) >= min(losses[:-patience]):
            control.should_training_stop = True
            self.stopped = "early"

    def _draw(self, point: CurvePoint) -> None:
        if self._curve is not None:
            self._curve.append(point)

    def _broken(self, output_dir: str, what: str, code: str) -> ModelError:
        """Return the error of a training that went wrong, naming the last checkpoint from before."""
        good = [path for path in checkpoints(Path(output_dir)) if self._is_good(path)]
        where = f"the last good checkpoint is {good[-1]}" if good else "there is no checkpoint from before"
        return ModelError(f"{what}; {where}", "start a new run with a smaller --lr", code=code)

    def _is_good(self, checkpoint: Path) -> bool:
        try:
            losses = json.loads((checkpoint / CLOCK_FILE).read_text(encoding="utf-8"))["losses"]
        except (OSError, ValueError):
            return False
        mean = sum(losses) / len(losses) if losses else math.nan
        return math.isfinite(mean) and (self._lowest == math.inf or mean <= 1.2 * self._lowest + 0.1)


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, whole or not, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.split("-")[1].isdigit()]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def last_checkpoint(folder: Path) -> str | None:
    """Return the newest whole checkpoint, and delete those whose writing was cut off."""
    whole = None
    for path in checkpoints(folder):
        if (path / CLOCK_FILE).exists():
            whole = str(path)
        else:
            shutil.rmtree(path, ignore_errors=True)
    return whole


def validation_of(
    scores: Callable[[dict[str, Any]], tuple[torch.Tensor, torch.Tensor]], batches: Sequence[Batch]
) -> Validation:
    """Return how well a student predicts the targets of held-out batches; `scores` is `Objective.scores`."""
    logprob = right = weight = 0.0
    for batch in batches:
        logprobs, is_best = scores(batch.inputs())
        weights = batch.targets.weights.to(logprobs.device)
        logprob += float((logprobs * weights).sum())
        right += float((is_best * weights).sum())
        weight += batch.weight
    return Validation(-logprob / max(weight, 1e-9), right / max(weight, 1e-9))


def cut_curve(path: Path, step: int) -> None:
    """Drop the points that a killed process drew after its last checkpoint, which was made at `step`."""
    kept, reached = [], 0
    for point in read_records(path, CurvePoint, missing_ok=True, skip_broken=True):
        reached = point.step if point.step is not None else reached
        if reached <= step:
            kept.append(to_json(point) + "\n")
    write_text(path, "".join(kept))
