"""The course of a run: its time, checkpoints, curve, validation, and when it ends, for good or ill."""

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
from ...localrun.core.reporter import Progress
from ..run import CLOCK_FILE
from .curves import CURVE_FILE, cut_curve
from .distributed import agreed
from .packing import Batch
from .report import TrainSettings
from .rows import Row

_WINDOW = 20  # steps whose mean loss is looked at
_DIVERGED = 2.0  # times the lowest mean so far, and half a nat more
_N_VALIDATIONS = 20  # in a run


@dataclass(frozen=True)
class Validation:
    """Cross-entropy over the held-out rows' targets, and the share of them that is the student's first choice."""

    loss: float
    accuracy: float


class Clock(TrainerCallback):
    """Knows how far the run is, by time where it is boxed; validates, saves, stops, and draws the curve.

    Raises in the loop:
        ModelError: the loss is not a number, or diverges.
    """

    def __init__(
        self,
        settings: TrainSettings,
        rows: Sequence[Row],
        computed_share: float,
        validate: Callable[[], Validation] | None,
        on_progress: Progress,
        rows_between: int = 0,
    ) -> None:
        """Take the run's rows in order, and which share of their tokens is computed (what rows share counts once).

        rows_between: at least so many rows train between two validations.
        """
        self._settings, self._on_progress, self._validate = settings, on_progress, validate
        self._tokens = [0]
        for row in rows:
            self._tokens.append(self._tokens[-1] + len(row.input_ids))
        self._computed_share, self._rows_between = computed_share, rows_between
        self._before = 0.0  # seconds of training before this process
        self._started = self._saved = time.monotonic()
        self._losses: list[float] = []
        self._lowest = math.inf  # mean loss of a window
        self._validations: list[tuple[float, Validation]] = []  # (progress, what was found)
        self._validated_rows = 0  # that had trained at the last validation
        self._best: int | None = None  # step of the best validation, whose checkpoint is kept
        self._curve: Path | None = None
        self.stopped = "end"

    def seconds(self) -> float:
        """Return how long the run has trained, earlier processes included."""
        return self._before + time.monotonic() - self._started

    def progress(self, steps_done: float) -> float:
        """Return how much of the run is done, 0 to 1."""
        if self._settings.minutes is None:
            return steps_done
        return agreed(min(1.0, max(steps_done, self.seconds() / (60 * self._settings.minutes))))

    def tokens(self, steps: int) -> int:
        """Return how many tokens the rows of the first steps have."""
        return self._tokens[self.rows(steps)]

    def rows(self, steps: int) -> int:
        """Return how many rows the first steps take."""
        return min(steps * self._settings.batch_size, len(self._tokens) - 1)

    def summary(self, steps: int) -> dict[str, Any]:
        """Return the run's figures, as `TrainReport` names them."""
        last = self._losses[-_WINDOW:]
        rate = self.tokens(steps) / max(self.seconds(), 1e-9)
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
        """Go on from where the checkpoint's process was; return the number of steps if that was the run's end."""
        kept = json.loads((checkpoint / CLOCK_FILE).read_text(encoding="utf-8"))
        self._before, self._lowest, self._losses = kept["seconds"], kept["lowest"], kept["losses"]
        self._validations = [(done, Validation(*found)) for done, found in kept["validations"]]
        self._validated_rows, self.stopped, self._best = kept["validated_rows"], kept["stopped"], kept.get("best")
        return int(checkpoint.name.split("-")[1]) if kept["ended"] == self._ends() else None

    def _ends(self) -> list[float | None]:
        """Return what ends the run, to be compared with what ended another."""
        return [len(self._tokens) - 1, self._settings.steps, self._settings.minutes]

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the time, and the curve where the checkpoint was."""
        if state.is_world_process_zero:
            self._curve = Path(args.output_dir).parent / CURVE_FILE
            cut_curve(self._curve, state.global_step)
        self._started = self._saved = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Validate, stop, save, and say how far it is."""
        done = self.progress(state.global_step / state.max_steps)
        if done >= 1:
            control.should_training_stop = True
            self.stopped = "time" if self._settings.minutes and state.global_step < state.max_steps else "end"
        self._maybe_validate(done, state.global_step, control)
        if agreed(time.monotonic() - self._saved) >= self._settings.save_every_s or control.should_training_stop:
            control.should_save = True
            self._saved = time.monotonic()
        rate = self.tokens(state.global_step) / max(self.seconds(), 1e-9)
        notes = [f"loss {self._losses[-1]:.3f}"] if self._losses else []
        if self._validations:
            notes.append(f"held out {100 * self._validations[-1][1].accuracy:.0f} % of tokens")
        self._on_progress("training", done, 1.0, ", ".join([*notes, f"{rate:.0f} tokens/s"]))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Add a point to the curve, and see that the loss is sound."""
        if not logs or "loss" not in logs:
            return
        loss = float(logs["loss"])
        self._losses = [*self._losses[-_WINDOW + 1 :], loss]
        mean = sum(self._losses) / len(self._losses)
        if not math.isfinite(loss):
            raise self._broken(args.output_dir, f"the loss is {loss} after step {state.global_step}")
        if len(self._losses) == _WINDOW:
            if mean > _DIVERGED * self._lowest + 0.5:
                raise self._broken(args.output_dir, f"the loss diverges: {self._lowest:.3f} at best, now {mean:.3f}")
            self._lowest = min(self._lowest, mean)
        rate = round(self.tokens(state.global_step) / max(self.seconds(), 1e-9), 1)
        self._draw(
            step=state.global_step,
            seconds=round(self.seconds(), 3),
            loss=loss,
            lr=logs["learning_rate"],
            tokens_per_s=rate,
        )

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Finish a checkpoint, and leave the two newest and the one of the best validation."""
        if not state.is_world_process_zero:
            return
        kept = {
            "seconds": self.seconds(),
            "lowest": self._lowest,
            "losses": self._losses,
            "validations": [(done, (found.loss, found.accuracy)) for done, found in self._validations],
            "validated_rows": self._validated_rows,
            "stopped": self.stopped,
            "best": self._best,
            "ended": self._ends() if control.should_training_stop else None,
        }
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        (folder / CLOCK_FILE).write_text(json.dumps(kept), encoding="utf-8")
        for older in checkpoints(Path(args.output_dir))[:-2]:
            if older.name != f"checkpoint-{self._best}":
                shutil.rmtree(older, ignore_errors=True)

    def best_checkpoint(self, folder: Path) -> str | None:
        """Return the checkpoint of the best validation; None if that was never saved."""
        path = folder / f"checkpoint-{self._best}"
        return str(path) if (path / CLOCK_FILE).exists() else None

    def _maybe_validate(self, done: float, step: int, control: Any) -> None:
        """Score the held-out rows every twentieth of the run, and stop where they no longer get better."""
        n_rows = self.rows(step)
        last = self._validations[-1][0] if self._validations else 0.0
        is_early = done - last < 1 / _N_VALIDATIONS or n_rows - self._validated_rows < self._rows_between
        if self._validate is None or (is_early and done < 1):
            return
        self._validated_rows = n_rows
        found = self._validate()
        self._validations.append((done, found))
        self._draw(validation_loss=round(found.loss, 5), validation_accuracy=round(found.accuracy, 5))
        losses = [each.loss for _, each in self._validations]
        patience = self._settings.patience
        if patience and losses[-1] == min(losses):
            self._best, control.should_save = step, True
        if done < 1 and patience and len(losses) > patience and min(losses[-patience:]) >= min(losses[:-patience]):
            control.should_training_stop = True
            self.stopped = "early"

    def _draw(self, **point: Any) -> None:
        if self._curve is not None:
            with self._curve.open("a", encoding="utf-8") as file:
                file.write(json.dumps(point) + "\n")

    def _broken(self, output_dir: str, what: str) -> ModelError:
        """Return the error of a run that went wrong, naming the last checkpoint from before."""
        good = [path for path in checkpoints(Path(output_dir)) if self._is_good(path)]
        if good:
            return ModelError(
                f"{what}; the last good checkpoint is {good[-1]}", "go on in a new run with a smaller --lr"
            )
        return ModelError(f"{what}, before there was a checkpoint", "try a smaller --lr")

    def _is_good(self, checkpoint: Path) -> bool:
        try:
            losses = json.loads((checkpoint / CLOCK_FILE).read_text(encoding="utf-8"))["losses"]
        except (OSError, ValueError):
            return False
        mean = sum(losses) / len(losses) if losses else math.nan
        return math.isfinite(mean) and (self._lowest == math.inf or mean <= 1.2 * self._lowest + 0.1)


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, oldest first, whole or not."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.split("-")[1].isdigit()]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def last_checkpoint(folder: Path) -> str | None:
    """Return the newest whole checkpoint, deleting those that were cut off while being written."""
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
    """Score held-out rows."""
    logprob = right = weight = 0.0
    for batch in batches:
        logprobs, is_best = scores(batch.inputs())
        weights = batch.targets.weights.to(logprobs.device)
        logprob += float((logprobs * weights).sum())
        right += float((is_best * weights).sum())
        weight += batch.weight
    return Validation(-logprob / max(weight, 1e-9), right / max(weight, 1e-9))
