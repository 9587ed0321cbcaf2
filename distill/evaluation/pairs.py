"""The answers of two models to the same problems, side by side: which the second gained, and which it lost."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STATES = ("gained", "lost", "still wrong", "still right", "unknown")
Answer = dict[str, Any]


@dataclass(frozen=True)
class Pair:
    """One problem and its two answers, as the files of answers have them."""

    before: Answer
    after: Answer

    @property
    def state(self) -> str:
        """What the second model made of it: one of `STATES`; unknown if one of the answers has no verdict."""
        verdicts = self.before.get("verdict"), self.after.get("verdict")
        if not set(verdicts) <= {"right", "wrong"}:
            return "unknown"
        if verdicts[0] == verdicts[1]:
            return f"still {verdicts[0]}"
        return "gained" if verdicts[1] == "right" else "lost"


def read_answers(path: Path) -> list[Answer]:
    """Return the answers that `evaluate` wrote to a file, without broken lines; an empty list without a file."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return []
    return [answer for line in lines if (answer := _answer(line)) is not None]


def _answer(line: bytes) -> Answer | None:
    try:
        answer = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return answer if isinstance(answer, dict) and isinstance(answer.get("problem_id"), str) else None


def pair_answers(before: Iterable[Answer], after: Iterable[Answer]) -> list[Pair]:
    """Return the problems that both answered, in the order of the second."""
    first = {answer["problem_id"]: answer for answer in before}
    return [Pair(first[one["problem_id"]], one) for one in after if one["problem_id"] in first]


def counts_of(pairs: Iterable[Pair]) -> dict[str, int]:
    """Return how many pairs are in each state, in the order of `STATES`."""
    counts = Counter(pair.state for pair in pairs)
    return {state: counts[state] for state in STATES}


def some_of(pairs: Sequence[Pair], n: int) -> list[Pair]:
    """Return at most n pairs, of each state in turn the first, so that a rare state is not crowded out."""
    waiting = {state: [pair for pair in pairs if pair.state == state] for state in STATES}
    taken = [waiting[state][i] for i in range(len(pairs)) for state in STATES if i < len(waiting[state])]
    return sorted(taken[:n], key=lambda pair: STATES.index(pair.state))
