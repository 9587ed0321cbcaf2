"""How the work tells a person how far it is and what to know: the command line draws it, a program may ignore it."""

from __future__ import annotations

import sys
import time
from typing import Self

from .printable import new_console, printable


class Reporter:
    """Is told how far the work is and what a person should know of it. This one says nothing; subclasses show it."""

    def progress(self, stage: str, done: float, *, total: float, note: str = "") -> None:
        """Take how much of a stage is done, of how much, with a note (rates, counts)."""

    def say(self, text: str) -> None:
        """Take one line that a person should know and no number shows."""


SILENT = Reporter()


class Bars(Reporter):
    """Draw each stage as a bar with time left on standard error; without a terminal, a plain line now and then."""

    def __init__(self, quiet: bool) -> None:
        """Draw nothing if quiet."""
        from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self._quiet, self._tasks = quiet, dict[str, TaskID]()
        console = new_console(stderr=True)
        self._plain = not console.is_terminal
        self._said: dict[str, float] = {}
        self._bars = RichProgress(
            TextColumn("{task.description:<22}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", style="dim", markup=False),
            console=console,
            disable=quiet or self._plain,
        )

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def say(self, text: str) -> None:
        """Print a note above the bars, on standard error."""
        print(f"note: {printable(text)}", file=sys.stderr)

    def progress(self, stage: str, done: float, *, total: float, note: str = "") -> None:
        """Draw how far a stage is."""
        if self._quiet:
            return
        if self._plain:
            if done >= total or time.monotonic() - self._said.get(stage, -1e9) > 15:
                self._said[stage] = time.monotonic() if done < total else float("inf")
                print(f"{stage}: {100 * done / max(total, 1e-9):.0f} %  {note}", file=sys.stderr, flush=True)
            return
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(stage, total=total, note=note)
        self._bars.update(self._tasks[stage], completed=done, total=total, note=note)
