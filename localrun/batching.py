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
from .generation import Completion, Sampling
from .llama import Context, Entry, Sampler
from .reading import Reading
from .thinking import prompt_opens_thinking


@dataclass
class _Request:
    """One prompt and what was said to it."""

    index: int
    tokens: list[int]  # of the prompt, then generated
    n_prompt: int
    limit: int  # tokens, prompt included
    reading: Reading
    sampler: Sampler
    started: float = field(default_factory=time.monotonic)
    n_cached: int = 0  # of its tokens, in the KV cache

    @property
    def n_pending(self) -> int:
        return len(self.tokens) - self.n_cached


def complete_all(
    context: Context, prompts: Sequence[str], sampling: Sampling, *, n_seq: int, n_ctx: int
) -> Iterator[tuple[int, Completion]]:
    """Yield (index, completion) as each ends; see `Engine.generate_many`. The sequences' KV cache has to be empty.

    Raises:
        ModelError: llama.cpp failed.
    """
    waiting = deque(enumerate(prompts))
    paused: list[_Request] = []
    running: dict[int, _Request] = {}  # by slot, the oldest first
    try:
        while waiting or paused or running:
            while (waiting or paused) and len(running) < n_seq:
                if not paused:
                    index, prompt = waiting.popleft()
                    tokens = context.model.tokenize(prompt)
                    if not 0 < len(tokens) < n_ctx:
                        yield index, _refused(len(tokens), n_ctx)
                        continue
                    paused.append(_open(context, index, tokens, prompt, sampling, n_ctx))
                used = sum(len(request.tokens) for request in running.values())
                if running and used + len(running) + len(paused[-1].tokens) >= context.n_ctx:
                    break
                slot = next(i for i in range(n_seq) if i not in running)
                running[slot] = paused.pop()
            at = _run_round(context, running, paused)
            for slot, index in at.items():
                request = running[slot]
                token = request.sampler.sample(context, index)
                request.tokens.append(token)
                ended = token in context.model.eog
                if not ended:
                    request.reading.add(token)
                if ended or len(request.tokens) >= request.limit:
                    del running[slot]
                    context.forget(slot)
                    request.sampler.close()
                    yield request.index, _completion(request, ended)
    finally:
        for request in [*running.values(), *paused]:
            request.sampler.close()


def _open(context: Context, index: int, tokens: list[int], prompt: str, sampling: Sampling, n_ctx: int) -> _Request:
    return _Request(
        index,
        tokens,
        len(tokens),
        min(len(tokens) + sampling.max_tokens, n_ctx),
        Reading(prompt_opens_thinking(prompt), context.model.piece),
        Sampler(sampling, sampling.seed + index),
    )


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


def _completion(request: _Request, ended: bool) -> Completion:
    reading = request.reading
    reading.finish()
    generated = request.tokens[request.n_prompt :]
    return Completion(
        content=reading.content,
        reasoning_content=reading.reasoning,
        closed=reading.closed,
        finish_reason="stop" if ended else "length",
        prompt_tokens=request.n_prompt,
        completion_tokens=len(generated),
        reasoning_tokens=reading.n_reasoning,
        seconds=time.monotonic() - request.started,
        token_ids=tuple(generated),
    )


def _refused(n_prompt: int, n_ctx: int) -> Completion:
    reason = f"the prompt takes {n_prompt} tokens and the context holds {n_ctx}" if n_prompt else "the prompt is empty"
    return Completion("", None, None, "error", n_prompt, 0, 0, 0.0, error=reason)
