"""Answer many prompts in one llama.cpp batch: sequences are decoded together and replaced as they end.

Each round runs one batch: the newest token of every sequence that generates, then as much of the waiting prompts as
fits. Sequences are admitted as long as their prompts fit. When the shared KV cache runs full, the youngest
sequence gives up its cells and is recomputed later (recompute preemption, as in vLLM, arXiv
2309.06180): answers are mostly far shorter than their limit, so reserving the limit would leave the batch half empty.
Prompts are drawn as slots come free, the first n_seq at once: their common beginning is computed once, and later
prompts that begin with it use it too.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

from ..core.generation import Completion, Guidance, Sampling
from ..families.thinking import Tags
from .llama import Context, Entry
from .logprobs import stack_rows, top_of
from .turn import Turn

if TYPE_CHECKING:
    from .logprobs import TopRow

_LEAST_PREFIX = 16  # tokens; a shorter shared prefix is not worth a pass of its own


_Refused = tuple[int, Completion]


@dataclass
class _Request:
    """One prompt and its answer so far."""

    index: int
    tokens: list[int]  # of the prompt, then generated
    n_prompt: int
    turn: Turn
    started: float = field(default_factory=time.monotonic)
    n_cached: int = 0  # of its tokens, in the KV cache
    top: list[TopRow] = field(default_factory=list)  # of each generated token, if asked for

    @property
    def n_pending(self) -> int:
        return len(self.tokens) - self.n_cached


@dataclass
class Batch:
    """How to answer prompts together in n_seq sequences of a context, any one of at most n_ctx tokens."""

    context: Context
    sampling: Sampling
    guidance: Guidance
    n_seq: int
    n_ctx: int
    tags: Tags | None
    top_logprobs: int = 0
    _running: dict[int, _Request] = field(default_factory=dict, init=False)  # by slot, the oldest first
    _waiting: deque[_Request | _Refused] = field(default_factory=deque, init=False)
    _shared: list[int] = field(default_factory=list, init=False)  # tokens computed once for all, in sequence n_seq

    def complete(self, prompts: Iterable[tuple[str, int]]) -> Iterator[tuple[int, Completion]]:
        """Yield (index, completion) as each of the (prompt, seed) ends; see `Engine.generate_many`.

        The sequences' KV cache has to be empty.

        Raises:
            ModelError: llama.cpp failed.
        """
        source = self._requests(prompts)
        self._waiting.extend(islice(source, self.n_seq))
        self._prefill_shared([request.tokens for request in self._waiting if isinstance(request, _Request)])
        try:
            while True:
                yield from self._fill_slots(source)
                if not self._running:
                    return
                for slot, index in self._run_round().items():
                    request = self._running[slot]
                    if self.top_logprobs:
                        request.top.append(top_of(self.context.logits(index), self.top_logprobs))
                    token = request.turn.next_token(self.context, index)
                    request.tokens.append(token)
                    request.turn.add(token)
                    if request.turn.finish_reason is not None:
                        del self._running[slot]
                        self.context.forget(slot)
                        request.turn.close()
                        yield request.index, _completion(request, self.top_logprobs)
        finally:
            for unfinished in [*self._running.values(), *self._waiting]:
                if isinstance(unfinished, _Request):
                    unfinished.turn.close()

    def _requests(self, prompts: Iterable[tuple[str, int]]) -> Iterator[_Request | _Refused]:
        """Yield what each prompt asks for, or why it cannot be answered."""
        for index, (text, seed) in enumerate(prompts):
            tokens = self.context.model.tokenize(text)
            if not 0 < len(tokens) < self.n_ctx:
                yield index, _refused(len(tokens), self.n_ctx)
                continue
            turn = Turn(
                self.context.model,
                text,
                sampling=self.sampling,
                guidance=self.guidance,
                seed=seed,
                limit=min(self.sampling.max_tokens, self.n_ctx - len(tokens)),
                tags=self.tags,
            )
            yield _Request(index, tokens, len(tokens), turn)

    def _fill_slots(self, source: Iterator[_Request | _Refused]) -> Iterator[_Refused]:
        """Admit requests while there are slots and room for their tokens; yield those that are refused."""
        while len(self._running) < self.n_seq:
            self._waiting.extend(islice(source, not self._waiting))
            if not self._waiting:
                return
            request = self._waiting.popleft()
            if not isinstance(request, _Request):
                yield request
            elif self._running and not self._has_room(request):
                self._waiting.appendleft(request)
                return
            else:
                self._admit(request)

    def _n_shared(self, request: _Request) -> int:
        """Return how many of a request's tokens are computed for all: those of the prefix, if it begins with them."""
        n = len(self._shared)
        return n if n < request.n_prompt and request.tokens[:n] == self._shared else 0

    def _has_room(self, request: _Request) -> bool:
        """Say whether a request's tokens fit beside the running ones and the next token of each."""
        others = [*self._running.values(), request]
        n_own = sum(len(other.tokens) - self._n_shared(other) for other in others)
        return len(self._shared) + n_own + len(self._running) < self.context.n_ctx

    def _admit(self, request: _Request) -> None:
        """Give a request a free slot, which begins with what is computed for all if the request does."""
        slot = next(i for i in range(self.n_seq) if i not in self._running)
        self._running[slot] = request
        request.n_cached = self._n_shared(request)
        if request.n_cached:
            self.context.share(self.n_seq, slot, request.n_cached)

    def _prefill_shared(self, prompts: Sequence[list[int]]) -> None:
        """Compute what all prompts begin with in sequence n_seq."""
        context = self.context
        if self.n_seq < 2 or len(prompts) < 2 or context.model.is_recurrent:
            return
        first, last = min(prompts), max(prompts)  # the two that differ earliest
        limit = min(map(len, prompts)) - 1  # every sequence needs logits of its own
        n = next((i for i in range(limit) if first[i] != last[i]), limit)
        if n < _LEAST_PREFIX:
            return
        for start in range(0, n, context.n_batch):
            batch = first[start : min(n, start + context.n_batch)]
            if not context.decode([Entry(t, start + i, self.n_seq, False) for i, t in enumerate(batch)]):
                context.forget(self.n_seq)
                return
        self._shared = first[:n]

    def _run_round(self) -> dict[int, int]:
        """Decode one batch; return, for each slot whose next token can be sampled, the index of its logits."""
        while True:
            entries, indexes, n_cached = _next_entries(self._running, self.context.n_batch)
            if self.context.decode(entries):
                for slot, n in n_cached.items():
                    self._running[slot].n_cached = n
                return indexes
            if len(self._running) == 1:
                raise self.context.full()
            slot = next(reversed(self._running))
            self.context.forget(slot)
            request = self._running.pop(slot)
            request.n_cached = 0
            self._waiting.appendleft(request)  # those that gave up their cells come first


def _next_entries(running: dict[int, _Request], n_batch: int) -> tuple[list[Entry], dict[int, int], dict[int, int]]:
    """Return a batch's entries, the index of each slot's logits to sample from, and what each slot will have cached."""
    entries: list[Entry] = []
    indexes: dict[int, int] = {}
    n_cached: dict[int, int] = {}
    # Those with one pending token go first: they generate, and a long prompt must not stop them.
    for slot, request in sorted(running.items(), key=lambda item: item[1].n_pending > 1):
        start = request.n_cached
        end = min(len(request.tokens), start + n_batch - len(entries))
        for position in range(start, end):
            wanted = position == len(request.tokens) - 1
            if wanted:
                indexes[slot] = len(entries)
            entries.append(Entry(request.tokens[position], position, slot, wanted))
        n_cached[slot] = end
    return entries, indexes, n_cached


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
