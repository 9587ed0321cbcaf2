"""Stream one answer: sample a token, report it as a step, run it, and where it pays check several guesses at once."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..core.generation import FinishReason
from ..families.thinking import Part
from .kv_cache import KVCache
from .speculation import Latch, Propose
from .turn import Turn


@dataclass(frozen=True)
class Step:
    """One generated token, and the text that can be shown with it, which may be empty or belong to earlier tokens.

    `token` is -1 in an extra step before that of a token which ends the thinking and begins the answer.
    `n_generated` and `n_reasoning` count tokens, the one that ends the turn included. `finish_reason` is set on the
    last step alone. `note` tells what the thinking budget or the loop guard has just done.
    """

    token: int
    text: str
    part: Part
    n_prompt: int
    n_generated: int
    n_reasoning: int
    closed: bool | None  # the thinking, so far; None if it never opened
    prompt_per_s: float  # tokens/s of the part of the prompt that the KV cache did not hold
    tokens_per_s: float
    finish_reason: FinishReason | None = None
    note: str | None = None
    n_drafted_right: int = 0  # tokens so far that were guessed and only checked


def stream_turn(
    turn: Turn, cache: KVCache, *, index: int, prompt_per_s: float, propose: Propose | None, latch: Latch
) -> Iterator[Step]:
    """Yield a step a token until the turn is over. The cache holds the prompt; its last logits have this index.

    Raises:
        ModelError: llama.cpp failed, or the context is full.
        RuntimeError: another call took the cache over between two steps.
    """
    owner, started, n_prompt = cache.owner, time.monotonic(), len(cache.tokens)
    text, draft, n_right = list(cache.tokens), list[int](), 0
    batch_s, n_kept = 0.0, n_prompt  # seconds of the last batch; the cache's length without the draft
    try:
        while turn.finish_reason is None:
            token = turn.next_token(cache.context, index)
            text.append(token)
            pieces = turn.add(token)
            is_guessed = index < len(draft) and draft[index] == token
            n_right += is_guessed
            *before, (part, out) = pieces or [(turn.reading.part, "")]
            n = len(turn.tokens)
            step = Step(
                token,
                out,
                part,
                n_prompt=n_prompt,
                n_generated=n,
                n_reasoning=turn.reading.n_reasoning,
                closed=turn.reading.closed,
                prompt_per_s=prompt_per_s,
                tokens_per_s=n / max(time.monotonic() - started, 1e-9),
                finish_reason=turn.finish_reason,
                note=turn.take_note(),
                n_drafted_right=n_right,
            )
            for part, out in before:
                yield replace(step, token=-1, text=out, part=part, finish_reason=None, note=None)
            yield step
            if cache.owner is not owner:
                raise RuntimeError("another call took over this engine in the middle of a stream")
            if is_guessed:  # the batch holds the logits after it already
                index, n_kept = index + 1, n_kept + 1
                continue
            cache.cut(n_kept)
            if n > 1:
                latch.record(len(draft), index, batch_s)
            if turn.finish_reason is not None:
                break
            draft = []
            if propose and turn.can_speculate and (n_wanted := latch.n_wanted()):
                draft = propose(text, min(n_wanted, turn.limit - n, cache.n_ctx - len(text)))
            began = time.monotonic()
            cache.extend([token, *draft], every=bool(draft))
            batch_s, n_kept, index = time.monotonic() - began, n_kept + 1, 0
    finally:
        turn.close()
        if cache.owner is owner:
            cache.cut(n_kept)
