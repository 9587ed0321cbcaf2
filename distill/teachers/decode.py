"""Batched decoding with a causal transformers model: rows leave the batch as they end, waiting ones take their place.

`model.generate` keeps every row until the slowest has ended, pays for its general machinery at each token, and copies
the whole KV cache to append to it. Here a step is one forward pass over the live rows with logits for the last position
alone, the cache grows in place, and prompts start longest first, so that the last rows in the batch are short ones.
What all prompts begin with (a system prompt, a question's fixed words) is computed once. Cache columns are
`[shared prefix | padding | own prompt and answer]`.

Left out on purpose: beam search, penalties, and refilling for models with sliding-window or recurrent layers, whose
caches cannot be cut by row and column: those run batch after batch.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional as F
from transformers.cache_utils import DynamicCache, DynamicLayer

from ...localrun.generation import Sampling
from .choose import choose, draw_uniforms

_PREFILL_TOKENS = 16384  # a prefill pass with its padding; bounds the memory that long prompts take
_ROOM = 64  # cache columns added beyond what is needed
_LEAST_PREFIX = 8  # tokens; a shorter shared prefix is not worth a pass of its own


@dataclass
class Row:
    """One request on its way: `tokens` grows until an end-of-turn token or `max_new` tokens."""

    index: int
    prompt: list[int]
    max_new: int
    uniforms: torch.Tensor | None = None  # [max_new]
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


class GrowingLayer(DynamicLayer):
    """A cache layer that keeps spare columns and appends in place, where DynamicLayer copies everything each token."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.n = 0
        self.room: tuple[torch.Tensor, torch.Tensor] | None = None  # two of [B, H, capacity, D]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append `[B, H, T, D]` states and return all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.n + key_states.shape[-2]
        if self.room is None:
            self.room = (_with_capacity(key_states, end + _ROOM), _with_capacity(value_states, end + _ROOM))
        elif end > self.room[0].shape[-2]:
            self.room = (_with_capacity(self.room[0], 2 * end), _with_capacity(self.room[1], 2 * end))
        keys, values = self.room
        keys[..., self.n : end, :] = key_states
        values[..., self.n : end, :] = value_states
        self.n = end
        self.keys, self.values = keys[..., :end, :], values[..., :end, :]
        return self.keys, self.values


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
        self.n_prefix = 0
        self.prefix: list[tuple[torch.Tensor, torch.Tensor]] = []  # a layer's keys and values, [1, H, n_prefix, D]
        self.by_row = all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)

    def run(self, requests: Sequence[Row], sampling: Sampling) -> Iterator[Row]:
        """Yield the rows of `requests` as they end."""
        waiting = sorted(requests, key=lambda row: len(row.prompt))  # taken from its end: the longest first
        self.rows, self.cache, self.width = [], None, 0
        self.prefix = self._prefill_shared(waiting) if self.by_row else []
        while True:
            live = [row for row in self.rows if not row.done]
            n_done = len(self.rows) - len(live)
            if not live and not waiting:
                self.rows, self.cache, self.prefix = [], None, []
                return
            # Leaving and joining copies the cache, so it waits until a quarter of the batch has ended.
            if not live or (self.by_row and 4 * n_done >= len(self.rows)):
                self._keep_live()
                new = [waiting.pop() for _ in range(min(self.batch_size - len(self.rows), len(waiting)))]
                for chunk in _prefill_chunks(new) if self.by_row else [new]:
                    yield from self._join(chunk, sampling)
            else:
                yield from self._step(sampling)

    def _step(self, sampling: Sampling) -> list[Row]:
        """Generate one token for every live row and return those that ended with it."""
        device = self.mask.device
        last = torch.tensor([[row.tokens[-1]] for row in self.rows], device=device)  # [B, 1]
        positions = torch.tensor([[row.length] for row in self.rows], device=device)  # [B, 1]
        self.width += 1
        if self.width > self.mask.shape[1]:
            self.mask = F.pad(self.mask, (0, self.width), value=1)
        logits = self._forward(last, self.mask[:, : self.width], positions, self.cache)
        return self._take(self.rows, logits, sampling)

    def _join(self, new: list[Row], sampling: Sampling) -> list[Row]:
        """Prefill new rows, take their first token, and put them into the batch."""
        device, started, n_prefix = self.model.device, time.monotonic(), self.n_prefix
        width = max(len(row.prompt) for row in new) - n_prefix
        pads = [n_prefix + width - len(row.prompt) for row in new]
        own = [[self.pad_id] * pad + row.prompt[n_prefix:] for row, pad in zip(new, pads, strict=True)]
        is_own = (torch.arange(width)[None] >= torch.tensor(pads)[:, None]).long()  # [B, T]
        positions = (n_prefix + is_own.cumsum(-1) - 1).clamp(min=0).to(device)  # [B, T]
        mask = F.pad(is_own, (n_prefix, 0), value=1).to(device)  # [B, n_prefix + T]
        cache = self._new_cache(len(new))
        logits = self._forward(torch.tensor(own, device=device), mask, positions, cache)
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
        self.n_prefix = n_shared if n_shared >= _LEAST_PREFIX else 0
        if not self.n_prefix:
            return []
        ids = torch.tensor([prompts[0][:n_shared]], device=self.model.device)
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
        ended: list[Row] = []
        for row, token in zip(rows, choose(logits, sampling, uniforms).tolist(), strict=True):
            if row.done:
                continue
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
        width = max(row.length for row in self.rows)
        columns = [*range(self.n_prefix), *range(self.width - width + self.n_prefix, self.width)]
        taken = torch.tensor(columns, device=self.mask.device)
        for layer in self.cache.layers:
            _replace(layer, *(x.index_select(0, index).index_select(2, taken) for x in (layer.keys, layer.values)))
        self.mask = self.mask.index_select(0, index).index_select(1, taken)
        self.width = width

    @torch.inference_mode()
    def _merge(self, new: list[Row], cache: Any, mask: torch.Tensor, width: int) -> None:
        """Put prefilled rows under the live ones, both aligned at the newest column."""
        wide = max(width, self.width)
        for layer, other in zip(self.cache.layers, cache.layers, strict=True):
            pairs = ((layer.keys, other.keys), (layer.values, other.values))
            _replace(layer, *(_stack(a, b, wide, self.n_prefix) for a, b in pairs))
        both = (self.mask[:, None, : self.width, None], mask[:, None, :, None])
        self.mask = _stack(*both, wide, self.n_prefix)[:, 0, :, 0]
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


def _replace(layer: GrowingLayer, keys: torch.Tensor, values: torch.Tensor) -> None:
    layer.n = keys.shape[-2]
    layer.room = (_with_capacity(keys, layer.n + _ROOM), _with_capacity(values, layer.n + _ROOM))
    layer.keys, layer.values = (x[..., : layer.n, :] for x in layer.room)


def _with_capacity(states: torch.Tensor, capacity: int) -> torch.Tensor:
    """Return a buffer `[B, H, capacity, D]` that begins with the states."""
    batch, heads, n, size = states.shape
    room = states.new_empty(batch, heads, capacity, size)
    room[..., :n, :] = states
    return room


def _stack(above: torch.Tensor, below: torch.Tensor, width: int, n_prefix: int) -> torch.Tensor:
    """Stack two `[B, H, T, D]` by row, padded after the prefix to one width; with zeros, as NaN would pass a mask."""
    stacked = above.new_zeros(len(above) + len(below), above.shape[1], width, above.shape[3])
    for part, rows in ((above, stacked[: len(above)]), (below, stacked[len(above) :])):
        rows[:, :, :n_prefix] = part[:, :, :n_prefix]
        rows[:, :, width - part.shape[2] + n_prefix :] = part[:, :, n_prefix:]
    return stacked
