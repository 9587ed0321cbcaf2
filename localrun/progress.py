"""How a stage tells how far it is: one function, which the command line draws as bars and a test ignores."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, float, float, str], None]
"""Called with the stage's name, how much is done, of how much, and a note (rates, counts)."""


def no_progress(stage: str, done: float, total: float, note: str = "") -> None:
    """Say nothing."""
