"""How much to ask of servers: how many requests at once, found by trying, and how many requests and tokens a minute.

The level doubles, then moves to the middle between what paid and what did not, as long as each step brings its share of
tokens a second. Where a server pushes back (429, 5xx) the level halves. Halving is undone if it cost throughput without
making errors rarer: then the load does not cause them, and that share of errors is tolerated from then on.

The idea of AIMD is from Jacobson, "Congestion Avoidance and Control" (1988), the search for the level between two known
ones from BIC (Xu, Harfoush, Rhee 2004). Left out on purpose: latency as a signal, which says nothing where answers
differ in length by a factor of a hundred.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

_START = 8
_MOST = 512  # connections; many systems let a process open 1024 files
_PAYS = 0.1  # share of the tokens a second that a step would bring if the server had nothing else to do
_COSTS = 0.75  # share of the earlier tokens a second: less after halving means that the server was not overloaded
_ANSWERS, _PIECES = 1, 8  # for each request at once, either of them: with fewer a rate is chance
# Windows until a level is tried again: one that brought nothing, which costs nothing, or was pushed back, which does.
_PATIENCE, _LONG_PATIENCE = 5, 30


@dataclass(frozen=True)
class _Window:
    """A time at one level: its tokens/s, its attempts, and how many of them were pushed back."""

    level: int
    rate: float
    n_tried: int
    n_pushed: int

    @property
    def share(self) -> float:
        """Share of the attempts that were pushed back."""
        return self.n_pushed / self.n_tried if self.n_tried else 0.0

    def is_pushed_more_than(self, share: float) -> bool:
        """Say whether more attempts were pushed back than chance explains where that share of them fails anyway."""
        usual = share * self.n_tried
        return self.n_pushed > usual + 2 * math.sqrt(usual)


class AdaptiveConcurrency:
    """The number of requests at once: `level`. A fixed one never changes.

    `window_s` is the time, in seconds, over which a level is judged.
    """

    def __init__(
        self,
        fixed: int | None = None,
        *,
        window_s: float = 2.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.level = fixed or _START
        self.is_fixed, self._window_s, self._clock = fixed is not None, window_s, clock
        self._last: _Window | None = None
        self._good, self._ceiling = 1, 0  # the highest level known to work, the lowest known to be too high (0: none)
        self._tolerated, self._n_waited, self._patience = 0.0, 0, _PATIENCE
        self._begin(fresh=True)

    @property
    def look_every_s(self) -> float:
        """How often to call `look`, in seconds."""
        return self._window_s / 8

    def _begin(self, fresh: bool) -> None:
        """Start a count. A fresh level gets a window to take effect, which does not count."""
        self._since, self._fresh = self._clock(), fresh
        self._n_tokens = self._n_pieces = self._n_answers = self._n_accepted = self._n_pushed = 0

    def heard(self, n_tokens: int) -> None:
        """Count a piece of an answer, of n tokens."""
        self._n_tokens += n_tokens
        self._n_pieces += 1

    def answered(self) -> None:
        """Count a whole answer."""
        self._n_answers += 1

    def accepted(self) -> None:
        """Count a request that a server has accepted."""
        self._n_accepted += 1

    def pushed_back(self) -> None:
        """Count a 429 or 5xx."""
        self._n_pushed += 1

    def look(self, n_open: int, was_full: bool) -> None:
        """Change the level if it is time to; called a few times in a window.

        `n_open` requests are under way; `was_full` says that more were held back since the last call. Only a time in
        which the level was reached and kept tells anything.
        """
        elapsed = self._clock() - self._since
        if self.is_fixed:
            return
        if not was_full or n_open > self.level:
            self._begin(fresh=True)
        elif elapsed >= self._window_s and self._fresh:
            self._begin(fresh=False)
        elif elapsed >= self._window_s and (self._is_telling or (self._n_pushed and elapsed >= 4 * self._window_s)):
            before, n_tried = self.level, self._n_accepted + self._n_pushed
            self.level = self._next_level(_Window(before, self._n_tokens / elapsed, n_tried, self._n_pushed))
            self._begin(fresh=self.level != before)

    @property
    def _is_telling(self) -> bool:
        """Whether enough was counted to compare: a rate over few answers, or few pieces, is chance."""
        return self._n_answers >= _ANSWERS * self.level or self._n_pieces >= _PIECES * self.level

    def _next_level(self, now: _Window) -> int:
        """Return the level after a window at this one."""
        last, self._last = self._last, now
        is_pushed = now.is_pushed_more_than(self._tolerated)
        was_in_vain = last and last.level > now.level and now.rate < _COSTS * last.rate and now.share > last.share / 2
        if is_pushed and now.level == 1:  # one request at a time is no load
            self._tolerated, self._ceiling = 1.5 * now.share, 0
        elif last and was_in_vain:
            self._tolerated, self._ceiling = 1.5 * last.share, 0
            return last.level
        elif is_pushed:
            self._ceiling, self._patience, half = now.level, _LONG_PATIENCE, max(1, now.level // 2)
            self._good = self._good if self._good < now.level else half
            return half
        if last and last.level < now.level and now.rate < last.rate * (1 + _PAYS * (now.level / last.level - 1)):
            self._good, self._ceiling, self._patience, self._last = last.level, now.level, _PATIENCE, None
            return last.level
        self._good = max(self._good, now.level)
        return self._higher(now.level)

    def _higher(self, level: int) -> int:
        """Return the next level to try: for a while the same one, where the ceiling is reached."""
        if level < self._good:
            return self._good
        if self._ceiling <= level:
            return min(_MOST, 2 * level)
        middle = (level + self._ceiling) // 2
        self._n_waited = self._n_waited + 1 if middle == level else 0
        if self._n_waited > self._patience:
            step = max(1, level // 8) if self._patience == _LONG_PATIENCE else level
            self._ceiling, self._n_waited = level + 2 * step, 0
        return middle


class RateLimit:
    """Spreads requests or tokens evenly over time, `per_minute` of them; None sets no limit."""

    def __init__(self, per_minute: int | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_s = per_minute / 60 if per_minute else None
        self._clock, self._free_at = clock, 0.0

    @property
    def wait_s(self) -> float:
        """How long to wait before more may be taken, in seconds."""
        return max(0.0, self._free_at - self._clock())

    def take(self, amount: float) -> None:
        """Count an amount from now on."""
        if self._per_s:
            self._free_at = max(self._clock(), self._free_at) + amount / self._per_s

    def correct(self, more: float) -> None:
        """Count what was taken beyond (or, negative, short of) the amount expected."""
        if self._per_s:
            self._free_at += more / self._per_s
