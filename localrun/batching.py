"""Answer many prompts in one llama.cpp batch: sequences are decoded together and replaced as they end.

Each round runs one batch: the newest token of every sequence that generates, then as much of the waiting prompts as
there is room for. Sequences are admitted as long as their prompts fit. When the shared KV cache runs full, the youngest
sequence gives up its cells and is computed again later from what it had said (recompute preemption, as in vLLM, arXiv
2309.06180): answers are mostly far shorter than their limit, so reserving the limit would leave the batch half empty.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from ..errors import ModelError
from .generation import Completion, Guidance, Sampling
from .llama import Context, Entry
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
    n_cached: int = 0  # of its tokens, in the KV cache

    @property
    def n_pending(self) -> int:
        return len(self.tokens) - self.n_cached


def complete_all(
    context: Context,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampling: Sampling,
    guidance: Guidance,
    *,
    n_seq: int,
    n_ctx: int,
    tags: Tags | None,
) -> Iterator[tuple[int, Completion]]:
    """Yield (index, completion) as each ends; see `Engine.generate_many`. The sequences' KV cache has to be empty.

    Raises:
        ModelError: llama.cpp failed.
    """
    tokenized = [context.model.tokenize(prompt) for prompt in prompts]
    n_shared = _prefill_shared(context, [tokens for tokens in tokenized if 0 < len(tokens) < n_ctx], n_seq)
    waiting = deque(enumerate(prompts))
    paused: list[_Request] = []
    running: dict[int, _Request] = {}  # by slot, the oldest first
    try:
        while waiting or paused or running:
            while (waiting or paused) and len(running) < n_seq:
                if not paused:
                    index, prompt = waiting.popleft()
                    tokens = tokenized[index]
                    if not 0 < len(tokens) < n_ctx:
                        yield index, _refused(len(tokens), n_ctx)
                        continue
                    limit = min(sampling.max_tokens, n_ctx - len(tokens))
                    turn = Turn(context.model, prompt, sampling, guidance, seed=seeds[index], limit=limit, tags=tags)
                    paused.append(_Request(index, list(tokens), len(tokens), turn))
                used = n_shared + sum(len(request.tokens) - n_shared for request in running.values())
                if running and used + len(running) + len(paused[-1].tokens) - n_shared >= context.n_ctx:
                    break
                slot = next(i for i in range(n_seq) if i not in running)
                running[slot] = paused.pop()
                if n_shared:
                    context.share(n_seq, slot, n_shared)
                    running[slot].n_cached = n_shared
            at = _run_round(context, running, paused)
            for slot, index in at.items():
                request = running[slot]
                token = request.turn.next_token(context, index)
                request.tokens.append(token)
                request.turn.add(token)
                if request.turn.finish_reason is not None:
                    del running[slot]
                    context.forget(slot)
                    request.turn.close()
                    yield request.index, _completion(request)
    finally:
        for request in [*running.values(), *paused]:
            request.turn.close()


def _prefill_shared(context: Context, prompts: Sequence[list[int]], n_seq: int) -> int:
    """Compute what all prompts begin with in sequence n_seq; return how many tokens that is."""
    if n_seq < 2 or len(prompts) < 2 or context.model.is_recurrent:
        return 0
    first, last = min(prompts), max(prompts)  # the two that differ earliest
    limit = min(map(len, prompts)) - 1  # every sequence needs logits of its own
    n = next((i for i in range(limit) if first[i] != last[i]), limit)
    if n < _LEAST_PREFIX:
        return 0
    for start in range(0, n, context.n_batch):
        entries = [
            Entry(t, start + i, n_seq, False) for i, t in enumerate(first[start : min(n, start + context.n_batch)])
        ]
        if not context.decode(entries):
            context.forget(n_seq)
            return 0
    return n


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


def _completion(request: _Request) -> Completion:
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
    )


def _refused(n_prompt: int, n_ctx: int) -> Completion:
    reason = f"the prompt takes {n_prompt} tokens and the context holds {n_ctx}" if n_prompt else "the prompt is empty"
    return Completion("", None, None, "error", n_prompt, 0, 0, 0.0, error=reason)
