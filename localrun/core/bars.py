"""Progress on a terminal, two lines a stage: a bar with the time left, and under it what there is to know."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from typing import Self

from rich.console import RenderableType
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from .printable import new_console, printable
from .reporter import Reporter
from .text import format_duration, shorten

_PLAIN_EVERY_S = 15.0
_LONGEST_NOTE = 500


class _TwoLines(Progress):
    """Rich's progress with the note of each task on a line of its own, cut at the terminal's edge."""

    def get_renderables(self) -> Iterable[RenderableType]:
        for task in self.tasks:
            yield self.make_tasks_table([task])
            yield _line(f"  {task.fields['note']}")


class Bars(Reporter):
    """Draw the stage at work on standard error, and leave a line of each that is done.

    Without a terminal it prints a plain line now and then.
    """

    def __init__(self, quiet: bool) -> None:
        """Draw nothing if quiet."""
        self._quiet, self._tasks = quiet, dict[str, TaskID]()
        console = new_console(stderr=True)
        self._plain = not console.is_terminal
        self._said: dict[str, float] = {}
        self._bars = _TwoLines(
            TextColumn("{task.description:<26}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=quiet or self._plain,
        )

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._leave_lines()
        self._bars.stop()

    def say(self, text: str) -> None:
        """Print a note above the bars, on standard error."""
        print(f"note: {printable(text)}", file=sys.stderr)

    def progress(self, stage: str, done: float, *, total: float, note: str = "") -> None:
        """Draw how far a stage is."""
        if self._quiet:
            return
        if self._plain:
            self._print(stage, done / max(total, 1e-9), note)
            return
        if stage not in self._tasks:
            self._leave_lines()
            self._tasks[stage] = self._bars.add_task(shorten(stage, 26), total=total, note="")
        self._bars.update(self._tasks[stage], completed=done, total=total, note=shorten(note, _LONGEST_NOTE))

    def _print(self, stage: str, share: float, note: str) -> None:
        last = self._said.get(stage, -1e9)
        was_done, is_done = last == float("inf"), share >= 1
        if was_done != is_done or time.monotonic() - last > _PLAIN_EVERY_S:
            self._said[stage] = float("inf") if is_done else time.monotonic()
            print(f"{stage}: {100 * share:.0f} %  {printable(note)}", file=sys.stderr, flush=True)

    def _leave_lines(self) -> None:
        """Leave one line of each stage that is done, so that what is drawn anew stays small."""
        for stage, number in list(self._tasks.items()):
            task = self._bars.tasks[self._bars.task_ids.index(number)]
            if task.finished:
                took = format_duration(task.finished_time or 0.0)
                line = _line(f"{task.description:<26} {took:>6}  {task.fields['note']}")
                self._bars.console.print(line, no_wrap=True, overflow="ellipsis")
                self._bars.remove_task(self._tasks.pop(stage))


def _line(text: str) -> Text:
    return Text(text, style="dim", no_wrap=True, overflow="ellipsis")
