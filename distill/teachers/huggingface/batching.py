"""Batched decoding with a causal transformers model: rows leave the batch as they end, and others take their place.

`model.generate` keeps every row until the slowest has ended, pays for its general machinery at each token, and copies
the whole KV cache to append to it. Here a step is one forward pass over the live rows with logits for the last position
alone, the cache grows in place, and prompts are drawn in windows and start longest first, so that rows of a length run
together and the last ones in the batch are short. What all prompts of the first window begin with (a system prompt, a
question's fixed words) is computed once; a later prompt that begins differently does not attend to it.

Left out on purpose: beam search, penalties, and refilling for models with sliding-window or recurrent layers, whose
caches cannot be cut by row and column: those run batch after batch.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice, repeat
from typing import Any

import torch
from torch.nn import functional as F
from transformers.cache_utils import DynamicCache, DynamicLayer

from ....localrun.core.generation import Sampling, TopLogprobs
from .kv_cache import GrowingLayer, LatentAttention, stack_rows
from .sampling import choose, draw_uniforms, top_of

_PREFILL_TOKENS = 16384  # a prefill pass with its padding; bounds the memory that long prompts take
_WINDOW = 2  # batches drawn at once and sorted by length
_LEAST_PREFIX = 8  # tokens; a shorter shared prefix is not worth a pass of its own


@dataclass
class SequenceState:
    """One request on its way, a row of the batch: `tokens` grows to an end-of-turn token or to `max_new` tokens."""

    index: int
    prompt: list[int]
    max_new: int
    uniforms: torch.Tensor | None = None  # [max_new]
    n_shared: int = 0
    """How many of the prompt's tokens are in the cache's shared prefix."""
    top: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    """Ids and log-probabilities `[k]` of the most probable tokens at each of `tokens`, if asked for."""
    tokens: list[int] = field(default_factory=list)
    started: float = 0.0
    seconds: float = 0.0
    ended: bool = False
    """Whether the model ended its turn itself."""

    @property
    def done(self) -> bool:
        """Whether nothing more is to be generated."""
        return self.ended or len(self.tokens) >= self.max_new

    @property
    def length(self) -> int:
        """Tokens in the cache: all but the newest, which the next step adds."""
        return len(self.prompt) + max(0, len(self.tokens) - 1)

    @property
    def n_unshared(self) -> int:
        """Columns of the cache that belong to this row alone."""
        return self.length - self.n_shared

    @property
    def logprobs(self) -> TopLogprobs | None:
        """The most probable tokens, `[T, k]`."""
        if not self.top:
            return None
        ids, values = (torch.stack(part).numpy() for part in zip(*self.top, strict=True))
        return TopLogprobs(ids, values)


class BatchDecoder:
    """Decodes requests in batches of up to `batch_size` rows. `eos_ids` end a turn; `pad_id` is never attended to."""

    def __init__(self, model: Any, *, batch_size: int, eos_ids: frozenset[int], pad_id: int) -> None:
        self.model = model
        self.batch_size = batch_size
        self.eos_ids = eos_ids
        self.pad_id = pad_id
        self.rows: list[SequenceState] = []
        self.cache: Any = None
        self.mask = torch.empty(0)  # [B, capacity] int64: 0 for padding
        self.width = 0  # columns of the cache in use, of which the first n_prefix hold the shared prefix
        self.shared: list[int] = []  # the prefix's tokens
        self.prefix: list[tuple[torch.Tensor, torch.Tensor]] = []  # a layer's keys and values, [1, H, n_prefix, D]
        self.n_top = 0
        self.latent = LatentAttention(model)
        self.by_row = all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)

    @property
    def n_prefix(self) -> int:
        """Tokens of the shared prefix."""
        return len(self.shared)

    def run(
        self, requests: Iterable[SequenceState], sampling: Sampling, top_logprobs: int = 0
    ) -> Iterator[SequenceState]:
        """Yield the rows of `requests` as they end; those that are done when they are drawn come back at once."""
        source, waiting = iter(requests), list[SequenceState]()  # taken from its end: the longest first
        self.rows, self.cache, self.width, self.n_top = [], None, 0, top_logprobs
        self.shared, self.prefix, is_first = [], [], True
        while True:
            n_done = sum(row.done for row in self.rows)
            # Leaving and joining copies the cache, so it waits until a quarter of the batch has ended.
            if n_done < len(self.rows) and not (self.by_row and 4 * n_done >= len(self.rows)):
                yield from self._step(sampling)
                continue
            self._keep_live()
            new: list[SequenceState] = []
            while len(self.rows) + len(new) < self.batch_size:
                if not waiting:
                    window = list(islice(source, _WINDOW * self.batch_size))
                    yield from (row for row in window if row.done)
                    waiting = sorted((row for row in window if not row.done), key=lambda row: len(row.prompt))
                    if is_first and self.by_row:
                        self.prefix, is_first = self._prefill_shared(waiting), False
                    if not window:
                        break
                new += [waiting.pop()] if waiting else []
            new.sort(key=lambda row: -len(row.prompt))
            for chunk in _prefill_chunks(new) if self.by_row else [new] * bool(new):
                yield from self._join(chunk, sampling)
            if not self.rows:
                self.cache, self.prefix = None, []
                return

    def _step(self, sampling: Sampling) -> list[SequenceState]:
        """Generate one token for every live row and return those that ended with it."""
        device = self.mask.device
        last = torch.tensor([[row.tokens[-1]] for row in self.rows], device=device)  # [B, 1]
        positions = torch.tensor([[row.length] for row in self.rows], device=device)  # [B, 1]
        self.width += 1
        if self.width > self.mask.shape[1]:
            self.mask = F.pad(self.mask, (0, self.width), value=1)
        with self.latent.one_token():
            logits = self._forward(last, self.cache, mask=self.mask[:, : self.width], positions=positions)
        return self._take(self.rows, logits, sampling)

    def _join(self, new: list[SequenceState], sampling: Sampling) -> list[SequenceState]:
        """Prefill new rows, take their first token, and put them into the batch."""
        started, n_prefix = time.monotonic(), self.n_prefix
        for row in new:
            row.started = started
            row.n_shared = n_prefix if n_prefix < len(row.prompt) and row.prompt[:n_prefix] == self.shared else 0
        logits, mask, cache = self._prefill(new)
        ended = self._take(new, logits, sampling)
        if self.cache is None:
            self.rows, self.cache, self.mask, self.width = list(new), cache, mask, mask.shape[1]
        else:
            self._merge(new, cache, mask)
        return ended

    def _prefill(self, new: list[SequenceState]) -> tuple[torch.Tensor, torch.Tensor, Any]:
        """Compute the prompts of new rows: return (logits `[B, V]`, mask `[B, n_prefix + T]`, their cache)."""
        device, n_prefix = self.model.device, self.n_prefix
        # Several answers to one prompt: it is computed once.
        place: dict[tuple[int, ...], int] = {}
        firsts: list[SequenceState] = []
        for row in new:
            if place.setdefault(tuple(row.prompt), len(firsts)) == len(firsts) or not self.by_row:
                firsts.append(row)
        width = max(row.n_unshared for row in new)
        unshared = [[self.pad_id] * (width - row.n_unshared) + row.prompt[row.n_shared :] for row in firsts]
        n_shared = torch.tensor([[row.n_shared] for row in firsts])
        n_padding = torch.tensor([[width - row.n_unshared] for row in firsts])
        is_token = (torch.arange(width)[None] >= n_padding).long()  # [B, T]
        # Padding is on the left: positions count tokens alone, after those of the shared prefix.
        positions = (n_shared + is_token.cumsum(-1) - 1).clamp(min=0).to(device)  # [B, T]
        mask = torch.cat([(n_shared > 0).long().expand(-1, n_prefix), is_token], 1).to(device)  # [B, n_prefix + T]
        cache = self._new_cache(len(firsts))
        logits = self._forward(torch.tensor(unshared, device=device), cache, mask=mask, positions=positions)
        if len(firsts) < len(new):
            index = torch.tensor([place[tuple(row.prompt)] for row in new], device=device)
            logits, mask = logits.index_select(0, index), mask.index_select(0, index)
            for layer in cache.layers:
                layer.keep(index, torch.arange(n_prefix + width, device=device))
        return logits, mask, cache

    def _prefill_shared(self, requests: Sequence[SequenceState]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Compute the cache of what all prompts begin with, short of any prompt's last token."""
        prompts = [row.prompt for row in requests]
        n_shared = _n_shared(prompts) if len(prompts) > 1 else 0
        self.shared = prompts[0][:n_shared] if n_shared >= _LEAST_PREFIX else []
        if not self.shared:
            return []
        ids = torch.tensor([self.shared], device=self.model.device)
        cache: Any = DynamicCache(config=self.model.config)
        positions = torch.arange(n_shared, device=ids.device)[None]
        self._forward(ids, cache, mask=torch.ones_like(ids), positions=positions)
        return [(layer.keys, layer.values) for layer in cache.layers]

    @torch.inference_mode()
    def _new_cache(self, n_rows: int) -> Any:
        """Return a cache that holds the shared prefix for every row."""
        cache: Any = DynamicCache(config=self.model.config)
        if self.by_row:
            cache.layers = [GrowingLayer() for _ in cache.layers]
        for layer, (keys, values) in zip(cache.layers, self.prefix, strict=bool(self.prefix)):
            layer.update(keys.expand(n_rows, -1, -1, -1), values.expand(n_rows, -1, -1, -1))
        return cache

    @torch.inference_mode()
    def _forward(self, ids: torch.Tensor, cache: Any, *, mask: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return the logits `[B, V]` at the last of the tokens `ids` `[B, T]`."""
        output = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: torch.Tensor = output.logits[:, -1]
        return logits

    def _take(self, rows: Sequence[SequenceState], logits: torch.Tensor, sampling: Sampling) -> list[SequenceState]:
        """Give every live row its next token and return the rows that ended with it."""
        uniforms = None
        if sampling.temperature > 0:
            uniforms = torch.stack([_uniform(row) for row in rows]).to(logits.device)
        top = zip(*(x.cpu() for x in top_of(logits, self.n_top)), strict=True) if self.n_top else repeat(None)
        ended: list[SequenceState] = []
        for row, token, best in zip(rows, choose(logits, sampling, uniforms=uniforms).tolist(), top, strict=False):
            if row.done:
                continue
            row.top += [best] if best else []
            row.tokens.append(token)
            row.ended = token in self.eos_ids
            if row.done:
                row.seconds = time.monotonic() - row.started
                ended.append(row)
        return ended

    @torch.inference_mode()
    def _keep_live(self) -> None:
        """Drop the rows that ended, and the columns that are padding in all the others."""
        keep = [i for i, row in enumerate(self.rows) if not row.done]
        self.rows = [self.rows[i] for i in keep]
        if not keep:
            self.cache = None
            return
        index = torch.tensor(keep, device=self.mask.device)
        width = self.n_prefix + max(row.n_unshared for row in self.rows)
        columns = [*range(self.n_prefix), *range(self.width - width + self.n_prefix, self.width)]
        taken = torch.tensor(columns, device=self.mask.device)
        for layer in self.cache.layers:
            layer.keep(index, taken)
        self.mask = self.mask.index_select(0, index).index_select(1, taken)
        self.width = width

    @torch.inference_mode()
    def _merge(self, new: list[SequenceState], cache: Any, mask: torch.Tensor) -> None:
        """Put prefilled rows under the live ones, both aligned at the newest column."""
        width = max(mask.shape[1], self.width)
        for layer, other in zip(self.cache.layers, cache.layers, strict=True):
            layer.put_under(other, width, self.n_prefix)
        both = (self.mask[:, None, : self.width, None], mask[:, None, :, None])
        self.mask = stack_rows(*both, width=width, n_prefix=self.n_prefix)[:, 0, :, 0]
        self.rows, self.width = [*self.rows, *new], width


def new_sequence(index: int, prompt: list[int], *, max_new: int, sampling: Sampling, seed: int) -> SequenceState:
    """Return the row of request `index`, with the random numbers of its seed."""
    return SequenceState(index, prompt, max_new, draw_uniforms(sampling, seed, max_new))


def _uniform(row: SequenceState) -> torch.Tensor:
    assert row.uniforms is not None
    return row.uniforms[min(len(row.tokens), row.max_new - 1)]


def _prefill_chunks(rows: list[SequenceState]) -> Iterator[list[SequenceState]]:
    """Cut rows, longest first, into groups of at most `_PREFILL_TOKENS` tokens with their padding."""
    start = 0
    while start < len(rows):
        count = max(1, _PREFILL_TOKENS // len(rows[start].prompt))
        yield rows[start : start + count]
        start += count


def _n_shared(prompts: Sequence[list[int]]) -> int:
    """Return how many tokens all prompts begin with, short of the shortest one's last."""
    first, last = min(prompts), max(prompts)  # the two that differ earliest
    limit = min(len(prompt) for prompt in prompts) - 1
    return next((i for i in range(limit) if first[i] != last[i]), limit)
