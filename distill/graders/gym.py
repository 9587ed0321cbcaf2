"""reasoning-gym's own scorers; the argument is the data set's name."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from .base import Submission


def load(name: str) -> None:
    """Import the scorer."""
    _scorer(name)


def grade(submission: Submission) -> float:
    """Return reasoning-gym's score, which may be a fraction.

    JSON turns the metadata's tuples into lists, and a few scorers compare with tuples: the better score counts.
    """
    scorer = _scorer(submission.argument)
    entry = {key: submission.problem.get(key) for key in ("question", "answer", "metadata")}
    score = float(scorer(submission.answer, entry))
    if score == 1.0 or not any(isinstance(value, list) for value in submission.metadata.values()):
        return score
    try:
        tupled = {key: _tupled(value) for key, value in submission.metadata.items()}
        return max(score, float(scorer(submission.answer, entry | {"metadata": tupled})))
    except Exception:  # this scorer needs the lists
        return score


def _tupled(value: Any) -> Any:
    return tuple(map(_tupled, value)) if isinstance(value, list) else value


@cache
def _scorer(name: str) -> Callable[[str | None, dict[str, Any]], float]:
    from reasoning_gym.factory import get_score_answer_fn

    scorer: Callable[[str | None, dict[str, Any]], float] = get_score_answer_fn(name)
    return scorer
