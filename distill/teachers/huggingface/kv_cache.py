"""A KV cache that grows in place and can be cut and stacked by row and column.

Columns are `[shared prefix | padding | own prompt and answer]`.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

_ROOM = 64  # columns added beyond what is needed


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
        self.keys, self.values = self.states
        return self.keys, self.values

    @property
    def states(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values in use, `[B, H, T, D]`."""
        assert self.room
        keys, values = self.room
        return keys[..., : self.n, :], values[..., : self.n, :]

    def keep(self, rows: torch.Tensor, columns: torch.Tensor) -> None:
        """Drop all other rows and columns."""
        device = self.states[0].device
        self._replace(*(x.index_select(0, rows.to(device)).index_select(2, columns.to(device)) for x in self.states))

    def put_under(self, other: GrowingLayer, width: int, n_prefix: int) -> None:
        """Add the rows of another layer, both aligned at the newest column of `width`."""
        pairs = zip(self.states, other.states, strict=True)
        self._replace(*(stack_rows(above, below, width, n_prefix) for above, below in pairs))

    def _replace(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.n = keys.shape[-2]
        self.room = (_with_capacity(keys, self.n + _ROOM), _with_capacity(values, self.n + _ROOM))
        self.keys, self.values = self.states


def stack_rows(above: torch.Tensor, below: torch.Tensor, width: int, n_prefix: int) -> torch.Tensor:
    """Stack two `[B, H, T, D]` by row, padded after the prefix to one width; with zeros, as NaN would pass a mask."""
    stacked = above.new_zeros(len(above) + len(below), above.shape[1], width, above.shape[3])
    for part, rows in ((above, stacked[: len(above)]), (below, stacked[len(above) :])):
        rows[:, :, :n_prefix] = part[:, :, :n_prefix]
        rows[:, :, width - part.shape[2] + n_prefix :] = part[:, :, n_prefix:]
    return stacked


def _with_capacity(states: torch.Tensor, capacity: int) -> torch.Tensor:
    """Return a buffer `[B, H, capacity, D]` that begins with the states."""
    batch, heads, n, size = states.shape
    room = states.new_empty(batch, heads, capacity, size)
    room[..., :n, :] = states
    return room
