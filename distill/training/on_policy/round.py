"""Where a round keeps its artifacts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ...run import Run


@dataclass(frozen=True)
class Round:
    """One round of a run: its number, its folder, the student that it starts from and the one that it makes (`out`)."""

    number: int
    folder: Path
    student: Path
    out: Path

    @property
    def samples_path(self) -> Path:
        """The student's answers."""
        return self.folder / "samples.jsonl"

    @property
    def scores_path(self) -> Path:
        """The teacher's log-probabilities of the samples."""
        return self.folder / "scores.bin"

    @property
    def own_scores_path(self) -> Path:
        """The student's log-probabilities of its own tokens (policy gradient)."""
        return self.folder / "own_scores.bin"

    @property
    def corrections_path(self) -> Path:
        """The teacher's answers to the problems that the student could not solve."""
        return self.folder / "corrections.jsonl"


def rounds_of(run: Run, n: int) -> list[Round]:
    """Return the rounds of a run: each starts from the student before it, and the last one makes `student/`."""
    folders = [run.folder / "rounds" / str(i) for i in range(n + 1)]
    students = [folder / "student" for folder in folders[:-1]] + [run.student_dir]
    return [Round(i, folders[i], students[i - 1], students[i]) for i in range(1, n + 1)]
