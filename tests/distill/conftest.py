"""What the tests of this stage share."""

from __future__ import annotations

import pytest

from deepdistill.localrun.core.reporter import Reporter


class Recorder(Reporter):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.steps: list[tuple[str, float, float, str]] = []

    def progress(self, stage: str, done: float, *, total: float, note: str = "") -> None:
        self.steps.append((stage, done, total, note))

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture
def recorder() -> Recorder:
    """A reporter that keeps what it is told, in `said` and `steps`."""
    return Recorder()
