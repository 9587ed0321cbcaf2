"""Notice, token by token, that a text goes in circles: its tail is one n-gram again and again."""

from __future__ import annotations

import numpy as np

LONGEST_PERIOD = 512  # tokens
LEAST_TOKENS = 64  # of a loop; a shorter repetition may be meant
LEAST_TIMES = 3


class LoopDetector:
    """Counts, for every period up to 512 tokens, for how long the text has repeated itself at that distance."""

    def __init__(self) -> None:
        self._tokens = np.full(LONGEST_PERIOD, -1, np.int64)  # the latest first
        self._runs = np.zeros(LONGEST_PERIOD, np.int64)  # tokens in a row that equal the one `period` before
        periods = np.arange(1, LONGEST_PERIOD + 1)
        self._enough = np.maximum(LEAST_TOKENS, LEAST_TIMES * periods) - periods

    def add(self, token: int) -> int | None:
        """Return the shortest period of the loop that the text is in with this token; None if it is in none."""
        self._runs = np.where(self._tokens == token, self._runs + 1, 0)
        self._tokens[1:] = self._tokens[:-1]
        self._tokens[0] = token
        found = np.flatnonzero(self._runs >= self._enough)
        return int(found[0]) + 1 if len(found) else None

    def reset(self) -> None:
        """Forget the text so far, so that only a new loop counts."""
        self._tokens[:] = -1
        self._runs[:] = 0
