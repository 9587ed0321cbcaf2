"""How the work tells a person how far it is and what to know: the command line draws it, a program may ignore it."""

from __future__ import annotations


class Reporter:
    """Is told how far the work is and what a person should know of it. This one says nothing; subclasses show it."""

    def progress(self, stage: str, done: float, *, total: float, note: str = "") -> None:
        """Take how much of a stage is done, of how much, with a note (rates, counts)."""

    def say(self, text: str) -> None:
        """Take one line that a person should know and no number shows."""


SILENT = Reporter()
