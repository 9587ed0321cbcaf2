"""Batched decoding with a causal transformers model: rows leave the batch as they end, waiting ones take their place.

`model.generate` keeps every row until the slowest has ended, pays for its general machinery at each token, and copies
the whole KV cache to append to it. Here a step is one forward pass over the live rows with logits for the last position
alone, the cache grows in place, and prompts are drawn in windows and start longest first, so that rows of a length run
together and the last ones in the batch are short. What the first window's prompts begin with (a system prompt, a
question's fixed words) is computed once; a later prompt that begins otherwise does not look at it.

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
class Row:
    """One request on its way: `tokens` grows until an end-of-turn token or `max_new` tokens."""

    index: int
    prompt: list[int]
    max_new: int
    uniforms: torch.Tensor | None = None  # [max_new]
    n_shared: int = 0
    """Of the prompt's tokens, those in the cache's shared prefix."""
    top: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    """Ids and log-probabilities `[k]` of the most probable tokens at each of `tokens`, if asked for."""
    tokens: list[int] = field(default_factory=list)
    started: float = 0.0
    seconds: float = 0.0
    ended: bool = False
    """The model ended its turn itself."""

    @property
    def done(self) -> bool:
        """Whether nothing more is to be generated."""
        return self.ended or len(self.tokens) >= self.max_new

    @property
    def length(self) -> int:
        """Tokens that stand in the cache: all but the newest, which the next step puts in."""
        return len(self.prompt) + max(0, len(self.tokens) - 1)

    @property
    def n_own(self) -> int:
        """Columns of the cache that are this row's alone."""
        return self.length - self.n_shared

    @property
    def logprobs(self) -> TopLogprobs | None:
        """What `top` holds, `[T, k]`."""
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
        self.rows: list[Row] = []
        self.cache: Any = None
        self.mask = torch.empty(0)  # [B, capacity] int64: 0 where padding stands
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

    def run(self, requests: Iterable[Row], sampling: Sampling, top_logprobs: int = 0) -> Iterator[Row]:
        """Yield the rows of `requests` as they end; those that are over when they are drawn come back at once."""
        source, waiting = iter(requests), list[Row]()  # taken from its end: the longest first
        self.rows, self.cache, self.width, self.n_top = [], None, 0, top_logprobs
        self.shared, self.prefix, is_first = [], [], True
        while True:
            n_done = sum(row.done for row in self.rows)
            # Leaving and joining copies the cache, so it waits until a quarter of the batch has ended.
            if n_done < len(self.rows) and not (self.by_row and 4 * n_done >= len(self.rows)):
                yield from self._step(sampling)
                continue
            self._keep_live()
            new: list[Row] = []
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

    def _step(self, sampling: Sampling) -> list[Row]:
        """Generate one token for every live row and return those that ended with it."""
        device = self.mask.device
        last = torch.tensor([[row.tokens[-1]] for row in self.rows], device=device)  # [B, 1]
        positions = torch.tensor([[row.length] for row in self.rows], device=device)  # [B, 1]
        self.width += 1
        if self.width > self.mask.shape[1]:
            self.mask = F.pad(self.mask, (0, self.width), value=1)
        with self.latent.one_token():
            logits = self._forward(last, self.mask[:, : self.width], positions, self.cache)
        return self._take(self.rows, logits, sampling)

    def _join(self, new: list[Row], sampling: Sampling) -> list[Row]:
        """Prefill new rows, take their first token, and put them into the batch."""
        device, started, n_prefix = self.model.device, time.monotonic(), self.n_prefix
        for row in new:
            row.n_shared = n_prefix if n_prefix < len(row.prompt) and row.prompt[:n_prefix] == self.shared else 0
        # Several answers to one prompt: it is computed once.
        place: dict[tuple[int, ...], int] = {}
        firsts: list[Row] = []
        for row in new:
            if place.setdefault(tuple(row.prompt), len(firsts)) == len(firsts) or not self.by_row:
                firsts.append(row)
        width = max(row.n_own for row in new)
        own = [[self.pad_id] * (width - row.n_own) + row.prompt[row.n_shared :] for row in firsts]
        n_shared = torch.tensor([[row.n_shared] for row in firsts])
        is_own = (torch.arange(width)[None] >= torch.tensor([[width - row.n_own] for row in firsts])).long()  # [B, T]
        positions = (n_shared + is_own.cumsum(-1) - 1).clamp(min=0).to(device)  # [B, T]
        mask = torch.cat([(n_shared > 0).long().expand(-1, n_prefix), is_own], 1).to(device)  # [B, n_prefix + T]
        cache = self._new_cache(len(firsts))
        logits = self._forward(torch.tensor(own, device=device), mask, positions, cache)
        if len(firsts) < len(new):
            index = torch.tensor([place[tuple(row.prompt)] for row in new], device=device)
            logits, mask = logits.index_select(0, index), mask.index_select(0, index)
            for layer in cache.layers:
                layer.keep(index, torch.arange(n_prefix + width, device=device))
        for row in new:
            row.started = started
        ended = self._take(new, logits, sampling)
        if self.cache is None:
            self.rows, self.cache, self.mask, self.width = list(new), cache, mask, n_prefix + width
        else:
            self._merge(new, cache, mask, n_prefix + width)
        return ended

    def _prefill_shared(self, requests: Sequence[Row]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Compute the cache of what all prompts begin with; every prompt keeps a token of its own."""
        prompts = [row.prompt for row in requests]
        n_shared = _n_shared(prompts) if len(prompts) > 1 else 0
        self.shared = prompts[0][:n_shared] if n_shared >= _LEAST_PREFIX else []
        if not self.shared:
            return []
        ids = torch.tensor([self.shared], device=self.model.device)
        cache: Any = DynamicCache(config=self.model.config)
        self._forward(ids, torch.ones_like(ids), torch.arange(n_shared, device=ids.device)[None], cache)
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
    def _forward(self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: Any) -> torch.Tensor:
        """Return the last position's logits `[B, V]`."""
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

    def _take(self, rows: Sequence[Row], logits: torch.Tensor, sampling: Sampling) -> list[Row]:
        """Give every live row its next token and return the rows that ended with it."""
        uniforms = None
        if sampling.temperature > 0:
            uniforms = torch.stack([_uniform(row) for row in rows]).to(logits.device)
        top = zip(*(x.cpu() for x in top_of(logits, self.n_top)), strict=True) if self.n_top else repeat(None)
        ended: list[Row] = []
        for row, token, best in zip(rows, choose(logits, sampling, uniforms).tolist(), top, strict=False):
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
        """Drop the rows that ended, and the columns that were padding to all who stay."""
        keep = [i for i, row in enumerate(self.rows) if not row.done]
        self.rows = [self.rows[i] for i in keep]
        if not keep:
            self.cache = None
            return
        index = torch.tensor(keep, device=self.mask.device)
        width = self.n_prefix + max(row.n_own for row in self.rows)
        columns = [*range(self.n_prefix), *range(self.width - width + self.n_prefix, self.width)]
        taken = torch.tensor(columns, device=self.mask.device)
        for layer in self.cache.layers:
            layer.keep(index, taken)
        self.mask = self.mask.index_select(0, index).index_select(1, taken)
        self.width = width

    @torch.inference_mode()
    def _merge(self, new: list[Row], cache: Any, mask: torch.Tensor, width: int) -> None:
        """Put prefilled rows under the live ones, both aligned at the newest column."""
        wide = max(width, self.width)
        for layer, other in zip(self.cache.layers, cache.layers, strict=True):
            layer.put_under(other, wide, self.n_prefix)
        both = (self.mask[:, None, : self.width, None], mask[:, None, :, None])
        self.mask = stack_rows(*both, wide, self.n_prefix)[:, 0, :, 0]
        self.rows, self.width = [*self.rows, *new], wide


def make_row(index: int, prompt: list[int], max_new: int, sampling: Sampling, seed: int) -> Row:
    """Return the row of request `index`, with the random numbers that its own seed gives."""
    return Row(index, prompt, max_new, draw_uniforms(sampling, seed, max_new))


def _uniform(row: Row) -> torch.Tensor:
    assert row.uniforms is not None
    return row.uniforms[min(len(row.tokens), row.max_new - 1)]


def _prefill_chunks(rows: list[Row]) -> Iterator[list[Row]]:
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
