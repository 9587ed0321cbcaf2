"""Notice, token by token, that a text goes in circles: its tail is one n-gram again and again."""

from __future__ import annotations

from collections import defaultdict, deque

LONGEST_PERIOD = 512  # tokens
LEAST_TOKENS = 64  # of a loop; a shorter repetition may be meant
LEAST_TIMES = 3


class LoopDetector:
    """Counts, for every period up to 512 tokens, for how long the text has repeated itself at that distance.

    Only periods at which the last token stood before are alive, so that a token costs as much as it is frequent.
    """

    def __init__(self) -> None:
        self._n = 0
        self._places: defaultdict[int, deque[int]] = defaultdict(deque)  # of each token, the latest first
        self._runs: dict[int, int] = {}  # period: tokens in a row that equal the one `period` before

    def add(self, token: int) -> int | None:
        """Return the shortest period of the loop that the text is in with this token; None if it is in none."""
        at, places, before = self._n, self._places[token], self._runs
        while places and at - places[-1] > LONGEST_PERIOD:
            places.pop()
        self._runs = {at - place: before.get(at - place, 0) + 1 for place in places}
        places.appendleft(at)
        self._n += 1
        return next((period for period, run in self._runs.items() if run >= _enough(period)), None)

    def reset(self) -> None:
        """Forget the text so far, so that only a new loop counts."""
        self._places.clear()
        self._runs.clear()


def _enough(period: int) -> int:
    """Return how many tokens in a row have to repeat themselves at a period: the first n-gram is not counted."""
    return max(LEAST_TOKENS, LEAST_TIMES * period) - period
