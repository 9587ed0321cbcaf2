"""The student's newest answer to one held-out question while it trains, so that a person sees what it learns.

Asking takes at most 2 % of the time: an answer is cut where that is used up, and the next waits until there is time for
a whole one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache

from ...localrun.core.text import shorten
from ...localrun.families.thinking import prompt_opens_thinking, split_thinking
from ..tokenizer import Tokenizer, text_of
from .fast.interface import NAME as ROW_ATTENTION
from .rows import Row

_SHARE, _N_CHARACTERS = 0.02, 30


class Question:
    """One held-out row; `ask` returns what the student answers, and what would be right."""

    def __init__(
        self, causal_lm: Any, row: Row, *, tokenizer: Tokenizer, now: Callable[[], float] = time.monotonic
    ) -> None:
        """Take the student, whose time runs from here. now: the time in seconds."""
        self._model, self._tokenizer, self._now = causal_lm, tokenizer, now
        self._prompt, right = list(row.input_ids[: row.n_prompt]), list(row.input_ids[row.n_prompt :])
        self._n_most = 2 * len(right)
        self._opens = prompt_opens_thinking(text_of(tokenizer, self._prompt))
        self._right = self._answer_of(right)
        self._started, self._spent, self._needed = now(), 0.0, 0.0
        self._newest = ""

    def ask(self) -> str:
        """Return the newest answer, a new one if there is time for it; empty before the first."""
        start = self._now()
        budget = _SHARE * (start - self._started) - self._spent
        if budget < self._needed or budget <= 0:
            return self._newest
        try:
            tokens, is_whole = self._decoded(start + budget)
        except (AttributeError, TypeError, ValueError, RuntimeError):  # a model that answers in a way of its own
            self._needed = math.inf
            return self._newest
        took = self._now() - start
        self._spent += took
        self._needed = took if is_whole else took * self._n_most / max(1, len(tokens))
        if not is_whole:
            self._newest = f"begins {shorten(text_of(self._tokenizer, tokens), _N_CHARACTERS)}"
        elif (given := self._answer_of(tokens)) == self._right:
            self._newest = f"says {given}"
        else:
            self._newest = f"says {given}, right is {self._right}"
        return self._newest

    @torch.no_grad()
    def _decoded(self, until: float) -> tuple[list[int], bool]:
        """Return the student's likeliest tokens, and whether they are whole: the time may end before the answer."""
        config, before = self._model.config, self._model.config._attn_implementation
        if before == ROW_ATTENTION:  # which has no cache
            config._attn_implementation = "sdpa"
        cache, ids, tokens = DynamicCache(config=config), self._prompt, list[int]()
        try:
            while len(tokens) < self._n_most and self._now() < until:
                given = torch.tensor([ids], device=self._model.device)
                states = self._model.get_decoder()(input_ids=given, past_key_values=cache, use_cache=True)
                ids = [int(self._model.get_output_embeddings()(states.last_hidden_state[0, -1]).argmax())]
                if ids[0] == self._tokenizer.eos_token_id:
                    return tokens, True
                tokens += ids
            return tokens, len(tokens) == self._n_most
        finally:
            config._attn_implementation = before

    def _answer_of(self, tokens: list[int]) -> str:
        kept = tokens[:-1] if tokens and tokens[-1] == self._tokenizer.eos_token_id else tokens
        reasoning, content, _ = split_thinking(text_of(self._tokenizer, kept), self._opens)
        return shorten(content or "…" + (reasoning or "")[-_N_CHARACTERS:], _N_CHARACTERS)
