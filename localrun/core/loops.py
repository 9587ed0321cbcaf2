"""Notice, token by token, that a text goes in circles: its tail is one n-gram again and again, or one pattern."""

from __future__ import annotations

from collections import Counter, defaultdict, deque

LONGEST_PERIOD = 512  # tokens
LEAST_TOKENS = 64  # of a loop; a shorter repetition may be meant
LEAST_TIMES = 3
_WINDOW, _LEAST_DIFFERENT = 256, 0.3  # the median of prose and code is 0.39 to 0.56, a loop's under DRY 0.23


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


class VarietyGauge:
    """Tells that a text only varies one pattern: of its last 256 tokens less than 30 % are different ones.

    That is what a loop becomes whose exact repetition is penalized. Tables of numbers look like it too, so that it
    means something only for a text that went in circles before.
    """

    def __init__(self) -> None:
        self._last: deque[int] = deque()
        self._counts: Counter[int] = Counter()

    def add(self, token: int) -> bool:
        """Say whether the text, with this token, is long enough and varies too little."""
        self._last.append(token)
        self._counts[token] += 1
        if len(self._last) > _WINDOW:
            gone = self._last.popleft()
            self._counts[gone] -= 1
            if not self._counts[gone]:
                del self._counts[gone]
        return len(self._last) == _WINDOW and len(self._counts) < _LEAST_DIFFERENT * _WINDOW


def _enough(period: int) -> int:
    """Return how many tokens in a row have to repeat themselves at a period: the first n-gram is not counted."""
    return max(LEAST_TOKENS, LEAST_TIMES * period) - period
