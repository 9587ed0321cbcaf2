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

from ..errors import ModelError
from .generation import Completion, Guidance, Sampling
from .llama import Context, Entry
from .logprobs import Row, stack_rows, top_of
from .thinking import Tags
from .turn import Turn

_LEAST_PREFIX = 16  # tokens; a shorter shared prefix is not worth a pass of its own


@dataclass
class _Request:
    """One prompt and what was said to it."""

    index: int
    tokens: list[int]  # of the prompt, then generated
    n_prompt: int
    turn: Turn
    started: float = field(default_factory=time.monotonic)
    n_shared: int = 0  # of its tokens, computed for all
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
    source = ((index, text, context.model.tokenize(text), seed) for index, (text, seed) in enumerate(prompts))
    drawn = deque(islice(source, n_seq))
    shared = _prefill_shared(context, [tokens for _, _, tokens, _ in drawn if 0 < len(tokens) < n_ctx], n_seq)
    paused: list[_Request] = []
    running: dict[int, _Request] = {}  # by slot, the oldest first
    try:
        while True:
            while len(running) < n_seq:
                if not paused:
                    following = drawn.popleft() if drawn else next(source, None)
                    if following is None:
                        break
                    index, text, tokens, seed = following
                    if not 0 < len(tokens) < n_ctx:
                        yield index, _refused(len(tokens), n_ctx)
                        continue
                    limit = min(sampling.max_tokens, n_ctx - len(tokens))
                    turn = Turn(context.model, text, sampling, guidance, seed=seed, limit=limit, tags=tags)
                    n_shared = len(shared) if shared == tokens[: len(shared)] and len(shared) < len(tokens) else 0
                    paused.append(_Request(index, tokens, len(tokens), turn, n_shared=n_shared))
                if running and not _has_room(context.n_ctx, len(shared), running, paused[-1]):
                    break
                _admit(context, running, paused.pop(), n_seq)
            if not running:
                return
            at = _run_round(context, running, paused)
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
        for request in [*running.values(), *paused]:
            request.turn.close()


def _has_room(n_cells: int, n_shared: int, running: dict[int, _Request], request: _Request) -> bool:
    """Say whether a request's tokens fit beside the running ones and the next token of each."""
    used = n_shared + sum(len(other.tokens) - other.n_shared for other in running.values())
    return used + len(running) + len(request.tokens) - request.n_shared < n_cells


def _admit(context: Context, running: dict[int, _Request], request: _Request, n_seq: int) -> None:
    """Give a request a free slot, which begins with what it shares with the others."""
    slot = next(i for i in range(n_seq) if i not in running)
    running[slot] = request
    if request.n_shared:
        context.share(n_seq, slot, request.n_shared)
        request.n_cached = request.n_shared


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


def _run_round(context: Context, running: dict[int, _Request], paused: list[_Request]) -> dict[int, int]:
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
        paused.append(running.pop(slot))


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
