"""The report of a run while it works: written again about every minute, on a page that reloads itself."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Self

from ...errors import DeepDistillError
from ...localrun.core.atomic import write_text
from ...localrun.core.reporter import Reporter
from ..run import Run
from .report import write_report

_EVERY_S = 60.0
_SHARE = 0.02  # of the time, at most: with a million traces a page takes long
_RUNNING = re.compile(r"<!-- running: begin -->.*?<!-- running: end -->", re.DOTALL)


class LiveReport(Reporter):
    """Passes on what it is told, and meanwhile keeps a run's report.html up to date.

    Use it as a context manager: after the block the page no longer says that the run is at work.
    """

    def __init__(self, run: Run, inner: Reporter, *, now: Callable[[], float] = time.monotonic) -> None:
        """Take the run, which is held, and the reporter to pass everything on to. now: the time in seconds."""
        self._run, self._inner, self._now = run, inner, now
        self._next = now()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        path = self._run.report_path
        with suppress(OSError, DeepDistillError):  # the work itself says what is wrong with the disk
            page = path.read_text(encoding="utf-8")
            if (settled := _RUNNING.sub("", page)) != page:
                write_text(path, settled)

    def progress(self, stage: str, done: float, *, total: float, note: str = "") -> None:
        """Pass it on, and write the page if it is time to."""
        self._inner.progress(stage, done, total=total, note=note)
        started = self._now()
        if started < self._next:
            return
        with suppress(OSError, DeepDistillError):  # a run does not end because its page could not be written
            status = f"{stage}, {100 * min(1.0, done / max(total, 1e-9)):.0f} %"
            write_report(self._run, status=f"{status}, {note}" if note else status)
        ended = self._now()
        self._next = ended + max(_EVERY_S, (ended - started) / _SHARE)

    def say(self, text: str) -> None:
        """Pass it on."""
        self._inner.say(text)
