"""Token ids and top-k log-probabilities out of a chat completion's `logprobs`, where the server names its tokens' ids.

OpenAI's format has the tokens as text alone. llama-server adds an `id`; vLLM, asked for `return_tokens_as_token_ids`,
writes `token_id:123` instead of the text. Text does not say which token it was: two tokens may read alike, and half a
character reads as nothing. So where there are no ids there is nothing to keep. mlx-lm gives ids too, but at each place
those of the most probable tokens alone, not of the one that it chose: its entries, which have no `bytes`, do not count.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ....localrun.core.generation import TopLogprobs

_PREFIX = "token_id:"


def read_logprobs(entries: Sequence[Any]) -> tuple[tuple[int, ...] | None, TopLogprobs | None]:
    """Return the ids and the log-probabilities that a server's entries, one a token, hold; None where it gave none.

    Where a position has fewer than the others, the missing ones have the id -1 and the log-probability -inf.
    """
    try:
        token_ids = tuple(_id(entry) for entry in entries)
        rows = [_row(entry) for entry in entries]
    except (KeyError, TypeError, ValueError, AttributeError):
        return None, None
    k = max(map(len, rows), default=0)
    if not token_ids:
        return None, None
    if not k:
        return token_ids, None
    rows = [row + [(-math.inf, -1)] * (k - len(row)) for row in rows]
    values, ids = np.array(rows, np.float64).transpose(2, 0, 1)  # [T, k] each
    return token_ids, TopLogprobs(ids.astype(np.int32), values.astype(np.float32))


def _id(entry: Any) -> int:
    """Return the token id of an entry; a KeyError or ValueError says that it has none."""
    if "id" in entry and "bytes" in entry:
        return int(entry["id"])
    token = entry["token"]
    if not token.startswith(_PREFIX):
        raise ValueError("no token id")
    return int(token.removeprefix(_PREFIX))


def _row(entry: Any) -> list[tuple[float, int]]:
    """Return (log-probability, id) of a position's alternatives, the most probable first."""
    return sorted(((float(top["logprob"]), _id(top)) for top in entry.get("top_logprobs") or []), reverse=True)
