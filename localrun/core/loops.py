"""What a loop is, for scores, filters, training and the chat alike.

A text is in a loop where its last 64 or more tokens repeat one n-gram three times or more. `find_loop` looks at a
whole text, `LoopDetector` at one that is being written, token by token. `VarietyGauge` knows what becomes of a loop
whose exact repetition is penalized.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

LEAST_TOKENS = 64  # of a loop; a shorter repetition may be meant
LEAST_TIMES = 3
_ANCHOR = 22  # tokens: few enough that any loop has said an anchor twice before it is long enough to be one
_WINDOW, _LEAST_DIFFERENT = 256, 0.3  # the median of prose and code is 0.39 to 0.56, a loop's under DRY 0.23


@dataclass(frozen=True)
class Loop:
    """Where the end of a text starts to be one n-gram of `period` tokens, over and over."""

    start: int
    period: int

    @property
    def first_repeat(self) -> int:
        """The first token that repeats an earlier one."""
        return self.start + self.period


def find_loop(tokens: Sequence[Hashable]) -> Loop | None:
    """Return the loop that a text ends in, the one of the shortest period; None if it ends in none."""
    backward = list(reversed(tokens))
    for period in _distances(backward):
        span = _least_span(period)
        if span > len(backward):
            return None
        if backward[: span - period] == backward[period:span]:
            while span < len(backward) and backward[span] == backward[span - period]:
                span += 1
            return Loop(len(backward) - span, period)
    return None


def _distances(backward: list[Hashable]) -> Iterator[int]:
    """Yield how far before the last token the same one stood, nearest first: no other distance can be a period."""
    distance = 0
    with suppress(ValueError, IndexError):
        while True:
            distance = backward.index(backward[0], distance + 1)
            yield distance


def _least_span(period: int) -> int:
    """Return how many tokens have to be periodic to count as a loop."""
    return max(LEAST_TOKENS, LEAST_TIMES * period)


class LoopDetector:
    """Tells, token by token, whether a text is in a loop, exactly as `find_loop` would.

    A token costs one look-up of the last 22. Only where these were said before are periods followed.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget the text so far, so that only a new loop counts."""
        self._tokens: list[int] = []
        self._places: dict[tuple[int, ...], list[int]] = {}  # of each anchor: where it ended
        self._runs: dict[int, int] = {}  # period: tokens in a row that equal the one `period` before

    def add(self, token: int) -> int | None:
        """Return the shortest period of the loop that the text is in with this token; None if it is in none."""
        tokens, at = self._tokens, len(self._tokens)
        tokens.append(token)
        if self._runs:
            self._runs = {period: run + 1 for period, run in self._runs.items() if tokens[at - period] == token}
        anchor = tuple(tokens[-_ANCHOR:])
        places = self._places.get(anchor)
        if places is None:
            self._places[anchor] = [at]
        elif at - places[-1] <= _ANCHOR // 2:
            # The anchor overlaps itself, as in "0 0 0 …": it can tell of this period alone. A loop of a longer one has
            # anchors that do not (Fine and Wilf), so a stretch of such places is one place, and long tables stay cheap.
            self._follow(at - places[-1])
            places[-1] = at
        else:
            for place in places:
                self._follow(at - place)
            places.append(at)
        return min((p for p, run in self._runs.items() if run >= _least_span(p) - p), default=None)

    def _follow(self, period: int) -> None:
        """Count from here on for how long the text repeats itself at a period."""
        if period in self._runs:
            return
        tokens, at, run = self._tokens, len(self._tokens) - 1, _ANCHOR
        while run + period <= at and tokens[at - run] == tokens[at - run - period]:
            run += 1
        self._runs[period] = run


class VarietyGauge:
    """Tells that a text only varies one pattern: of its last 256 tokens less than 30 % are different ones.

    That is what a loop becomes whose exact repetition is penalized. Tables of numbers look like it too, so it means
    something only for a text that was in a loop before.
    """

    def __init__(self) -> None:
        self._last: deque[int] = deque(maxlen=_WINDOW)

    def add(self, token: int) -> bool:
        """Say whether the text, with this token, is long enough and varies too little."""
        self._last.append(token)
        return len(self._last) == _WINDOW and len(set(self._last)) < _LEAST_DIFFERENT * _WINDOW
