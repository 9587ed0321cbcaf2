"""Guess the next tokens, so that the model checks several in one batch instead of making them one by one.

Guesses never change the text, but for rounding: each is compared with the token that the sampler chooses there (arXiv
2211.17192, for a draft that puts all probability on one token). Wrong guesses cost time, so a latch measures whether
they pay, and turns them off while they do not.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .kv_cache import KVCache

Propose = Callable[[Sequence[int], int], list[int]]
"""From the tokens so far and a number, at most so many tokens that may come next."""

_GRAMS = (4, 3)  # lengths looked up, the longest first; pairs occur everywhere and predict little
_FIRST, _LEAST, _MOST = 4, 2, 16  # tokens in a draft
_MEASURED = 3  # tokens generated one by one before the first draft, to know their cost
_TRIED = 4  # drafts before the first judgement
_PROFIT = 1.02  # times as fast as without, or drafting stops
_SHORT_PAUSE, _LONG_PAUSE = 32, 512  # tokens until it is tried again, doubled each time


class NgramDrafts:
    """Guesses that the text continues as it did after the last earlier occurrence of its newest tokens."""

    def __init__(self) -> None:
        self._after: dict[tuple[int, ...], int] = {}  # the position after an n-gram's last occurrence
        self._n_seen = 0

    def __call__(self, tokens: Sequence[int], n: int) -> list[int]:
        """Return at most n tokens; none where the last three tokens are new. The text only grows between calls."""
        for end in range(self._n_seen, len(tokens)):  # an n-gram at the very end has no continuation yet
            for size in _GRAMS:
                if end >= size:
                    self._after[tuple(tokens[end - size : end])] = end
        self._n_seen = len(tokens)
        for size in _GRAMS:
            at = self._after.get(tuple(tokens[len(tokens) - size :])) if len(tokens) >= size else None
            if at is not None:
                return list(tokens[at : at + n])
        return []


class ModelDrafts:
    """Guesses what a smaller model of the same vocabulary finds most likely."""

    def __init__(self, cache: KVCache, eog: Collection[int]) -> None:
        """Guess with the model that `cache` belongs to; a token of `eog` ends a guess."""
        self._cache, self._eog = cache, eog

    def __call__(self, tokens: Sequence[int], n: int) -> list[int]:
        """Return at most n tokens; none where they would not fit the draft model's context."""
        if len(tokens) + n >= self._cache.n_ctx:
            return []
        _, index = self._cache.prefill(list(tokens))
        proposed: list[int] = []
        while True:
            token = int(self._cache.context.logits(index).argmax())
            proposed.append(token)
            if len(proposed) >= n or token in self._eog:
                return proposed
            index = self._cache.extend([token])


class Latch:
    """Decides how many tokens to draft, from what drafts have cost and gained so far; 0 while they do not pay."""

    def __init__(self) -> None:
        self._n = _FIRST
        self._plain_s, self._n_plain = 0.0, 0
        self._gain, self._n_tried = 1.0, 0
        self._pause, self._resume_at = _SHORT_PAUSE, 0
        self._n_tokens = 0

    def n_wanted(self) -> int:
        """Return how many tokens to draft next."""
        if self._n_plain < _MEASURED or self._n_tokens < self._resume_at:
            return 0
        return self._n

    def record(self, n_drafted: int, n_accepted: int, seconds: float) -> None:
        """Record one batch: a token and n_drafted guesses after it, of which n_accepted were right."""
        self._n_tokens += 1 + n_accepted
        if not n_drafted:
            # The first is slower: it warms the caches.
            self._n_plain += 1
            rate = 1.0 if self._n_plain <= 2 else 0.1
            self._plain_s += rate * (seconds - self._plain_s)
            return
        gain = (1 + n_accepted) * self._plain_s / max(seconds, 1e-9)
        self._n_tried += 1
        self._gain += (1 / self._n_tried if self._n_tried <= _TRIED else 0.25) * (gain - self._gain)
        self._n = min(_MOST, 2 * self._n) if n_accepted == n_drafted else max(_LEAST, n_accepted + 1)
        if self._n_tried >= _TRIED and self._gain < _PROFIT:
            self._resume_at = self._n_tokens + self._pause
            self._pause = min(_LONG_PAUSE, 2 * self._pause)
            self._n_tried = _TRIED - 2  # two more drafts decide the next time
        elif self._gain > _PROFIT and self._n_tried > 2 * _TRIED:
            self._pause = _SHORT_PAUSE
