"""Loops in what the student says, as rows that teach it not to go on.

The first time round may be meant, so only what repeats it is a negative: those tokens get less probable (unlikelihood),
all that came before is left alone. The period is found as `evaluate` finds it.

Source: unlikelihood training, arXiv 1908.04319, on the sequence level with the repeated n-gram as the negative.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ....localrun.core.loops import LEAST_TIMES, LEAST_TOKENS
from ..rows import Row

_MOST_NEGATIVES = 64  # tokens of one sample: a loop of 500 teaches no more than its beginning


@dataclass(frozen=True)
class Loop:
    """Where a text's tail begins to be one n-gram of `period` tokens again and again."""

    start: int
    period: int

    @property
    def first_repeat(self) -> int:
        """The first token that repeats what was said."""
        return self.start + self.period


def find_loop(tokens: Sequence[int]) -> Loop | None:
    """Return the loop that a text ends in: 64 tokens or more that are one n-gram, three times or more."""
    n = len(tokens)
    for period in range(1, n // LEAST_TIMES + 1):
        span = max(LEAST_TOKENS, LEAST_TIMES * period)
        if span > n:
            return None
        if all(tokens[i] == tokens[i + period] for i in range(n - span, n - period)):
            start = n - span
            while start > 0 and tokens[start - 1] == tokens[start - 1 + period]:
                start -= 1
            return Loop(start, period)
    return None


def negative_row(prompt: Sequence[int], tokens: Sequence[int], loop: Loop) -> Row:
    """Return the row that makes the repeating tokens of a sample less probable where they stood."""
    end = min(len(tokens), loop.first_repeat + _MOST_NEGATIVES)
    is_negative = [float(i >= loop.first_repeat) for i in range(end)]
    return Row([*prompt, *tokens[:end]], len(prompt), losses=(("unlikelihood", 1.0),), weights=is_negative)
