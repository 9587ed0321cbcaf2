"""Answer many prompts in one llama.cpp batch: sequences are decoded together and replaced as they end.

Each round runs one batch: the newest token of every sequence that generates, then as much of the waiting prompts as
there is room for. Sequences are admitted as long as their prompts fit. When the shared KV cache runs full, the youngest
sequence gives up its cells and is computed again later from what it had said (recompute preemption, as in vLLM, arXiv
2309.06180): answers are mostly far shorter than their limit, so reserving the limit would leave the batch half empty.
Prompts are drawn as places come free, the first n_seq at once: what those begin with in common is computed once, and
later prompts that begin with it use it too.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

from ...errors import ModelError
from ..core.generation import Completion, Guidance, Sampling
from ..families.thinking import Tags
from .llama import Context, Entry
from .logprobs import stack_rows, top_of
from .turn import Turn

if TYPE_CHECKING:
    from .logprobs import Row

_LEAST_PREFIX = 16  # tokens; a shorter shared prefix is not worth a pass of its own


_Refused = tuple[int, Completion]


@dataclass
class _Request:
    """One prompt and what was said to it."""

    index: int
    tokens: list[int]  # of the prompt, then generated
    n_prompt: int
    turn: Turn
    started: float = field(default_factory=time.monotonic)
    n_cached: int = 0  # of its tokens, in the KV cache
    top: list[Row] = field(default_factory=list)  # of each generated token, if asked for

    @property
    def n_pending(self) -> int:
        return len(self.tokens) - self.n_cached


def complete_all(
    context: Context,
    prompts: Iterable[tuple[str, int]],
    sampling: Sampling,
    guidance: Guidance,
    *,
    n_seq: int,
    n_ctx: int,
    tags: Tags | None,
    top_logprobs: int = 0,
) -> Iterator[tuple[int, Completion]]:
    """Yield (index, completion) as each of the (prompt, seed) ends; see `Engine.generate_many`.

    The sequences' KV cache has to be empty.

    Raises:
        ModelError: llama.cpp failed.
    """
    source = _requests(context, prompts, sampling, guidance, n_ctx, tags)
    waiting = deque(islice(source, n_seq))  # those that gave up their cells come first
    shared = _prefill_shared(context, [r.tokens for r in waiting if isinstance(r, _Request)], n_seq)
    running: dict[int, _Request] = {}  # by slot, the oldest first
    try:
        while True:
            while len(running) < n_seq:
                waiting.extend(islice(source, not waiting))
                if not waiting:
                    break
                request = waiting.popleft()
                if not isinstance(request, _Request):
                    yield request
                elif running and not _has_room(context, running, request, shared):
                    waiting.appendleft(request)
                    break
                else:
                    _admit(context, running, request, shared, n_seq)
            if not running:
                return
            at = _run_round(context, running, waiting)
            for slot, entry in at.items():
                request = running[slot]
                if top_logprobs:
                    request.top.append(top_of(context.logits(entry), top_logprobs))
                token = request.turn.next_token(context, entry)
                request.tokens.append(token)
                request.turn.add(token)
                if request.turn.finish_reason is not None:
                    del running[slot]
                    context.forget(slot)
                    request.turn.close()
                    yield request.index, _completion(request, top_logprobs)
    finally:
        for unfinished in [*running.values(), *waiting]:
            if isinstance(unfinished, _Request):
                unfinished.turn.close()


def _requests(
    context: Context,
    prompts: Iterable[tuple[str, int]],
    sampling: Sampling,
    guidance: Guidance,
    n_ctx: int,
    tags: Tags | None,
) -> Iterator[_Request | _Refused]:
    """Yield what each prompt asks for, or why it cannot be."""
    for index, (text, seed) in enumerate(prompts):
        tokens = context.model.tokenize(text)
        if 0 < len(tokens) < n_ctx:
            limit = min(sampling.max_tokens, n_ctx - len(tokens))
            turn = Turn(context.model, text, sampling, guidance, seed=seed, limit=limit, tags=tags)
            yield _Request(index, tokens, len(tokens), turn)
        else:
            yield index, _refused(len(tokens), n_ctx)


def _n_shared(request: _Request, shared: list[int]) -> int:
    """Return how many of a request's tokens are computed for all: those of the prefix, if it begins with them."""
    n = len(shared)
    return n if n < request.n_prompt and request.tokens[:n] == shared else 0


def _has_room(context: Context, running: dict[int, _Request], request: _Request, shared: list[int]) -> bool:
    """Say whether a request's tokens fit beside the running ones and the next token of each."""
    own = sum(len(other.tokens) - _n_shared(other, shared) for other in [*running.values(), request])
    return len(shared) + own + len(running) < context.n_ctx


def _admit(context: Context, running: dict[int, _Request], request: _Request, shared: list[int], n_seq: int) -> None:
    """Give a request a free slot, which begins with what is computed for all if the request does."""
    slot = next(i for i in range(n_seq) if i not in running)
    running[slot] = request
    request.n_cached = _n_shared(request, shared)
    if request.n_cached:
        context.share(n_seq, slot, request.n_cached)


def _prefill_shared(context: Context, prompts: Sequence[list[int]], n_seq: int) -> list[int]:
    """Compute what all prompts begin with in sequence n_seq; return its tokens."""
    if n_seq < 2 or len(prompts) < 2 or context.model.is_recurrent:
        return []
    first, last = min(prompts), max(prompts)  # the two that differ earliest
    limit = min(map(len, prompts)) - 1  # every sequence needs logits of its own
    n = next((i for i in range(limit) if first[i] != last[i]), limit)
    if n < _LEAST_PREFIX:
        return []
    for start in range(0, n, context.n_batch):
        entries = [
            Entry(t, start + i, n_seq, False) for i, t in enumerate(first[start : min(n, start + context.n_batch)])
        ]
        if not context.decode(entries):
            context.forget(n_seq)
            return []
    return first[:n]


def _run_round(context: Context, running: dict[int, _Request], waiting: deque[_Request | _Refused]) -> dict[int, int]:
    """Decode one batch; return, for each slot whose next token can be sampled, where its logits stand."""
    while True:
        entries, at, n_cached = _plan(running, context.n_batch)
        if context.decode(entries):
            for slot, n in n_cached.items():
                running[slot].n_cached = n
            return at
        if len(running) == 1:
            raise ModelError("the context is full", "give a larger --context")
        slot = next(reversed(running))
        context.forget(slot)
        running[slot].n_cached = 0
        waiting.appendleft(running.pop(slot))


def _plan(running: dict[int, _Request], n_batch: int) -> tuple[list[Entry], dict[int, int], dict[int, int]]:
    """Return a batch's entries, where the logits to sample from will stand, and what each slot will have cached."""
    entries: list[Entry] = []
    at: dict[int, int] = {}
    n_cached: dict[int, int] = {}
    # Those with one pending token go first: they generate, and a long prompt must not stop them.
    for slot, request in sorted(running.items(), key=lambda item: item[1].n_pending > 1):
        start = request.n_cached
        end = min(len(request.tokens), start + n_batch - len(entries))
        for position in range(start, end):
            wanted = position == len(request.tokens) - 1
            if wanted:
                at[slot] = len(entries)
            entries.append(Entry(request.tokens[position], position, slot, wanted))
        n_cached[slot] = end
    return entries, at, n_cached


def _completion(request: _Request, top_logprobs: int) -> Completion:
    reading, reason = request.turn.reading, request.turn.finish_reason
    assert reason is not None
    generated = request.turn.tokens
    return Completion(
        content=request.turn.answer,
        reasoning_content=reading.reasoning,
        closed=reading.closed,
        finish_reason=reason,
        prompt_tokens=request.n_prompt,
        completion_tokens=len(generated),
        reasoning_tokens=reading.n_reasoning,
        seconds=time.monotonic() - request.started,
        token_ids=tuple(generated),
        logprobs=stack_rows(request.top, top_logprobs) if top_logprobs else None,
    )


def _refused(n_prompt: int, n_ctx: int) -> Completion:
    reason = f"the prompt takes {n_prompt} tokens and the context holds {n_ctx}" if n_prompt else "the prompt is empty"
    return Completion("", None, None, "error", n_prompt, 0, 0, 0.0, error=reason)
