"""The KV cache of one stream: which tokens it holds, and how a new prompt reuses those that it begins with.

A conversation's next turn computes only what is new. `save` keeps the cache on disk, so that another process need not
compute a long conversation again.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.atomic import replacing_file
from .llama import Context

if TYPE_CHECKING:
    from .vision import Projector

_MAGIC = b"deepdistill-state-1\n"


class KVCache:
    """Sequence 0 of a context. `tokens` has one number a position: a token, or a negative one within an image.

    `owner` is another object whenever the cache is brought to another prompt: a stream that still waits to continue
    after its old one sees that it may not.
    """

    def __init__(self, context: Context, n_ctx: int) -> None:
        """Begin with an empty cache, to hold at most n_ctx tokens: the context may have room for more."""
        self.context, self.n_ctx = context, n_ctx
        self.tokens: list[int] = []
        self.owner = object()

    def release(self) -> None:
        """Take the cache away from the call that uses it."""
        self.owner = object()

    def clear(self) -> None:
        """Drop everything, other sequences too."""
        self.release()
        for sequence in range(self.context.n_seq):
            self.context.forget(sequence)
        self.tokens = []

    def prefill(self, tokens: list[int]) -> tuple[int, int]:
        """Bring the sequence to `tokens`; return how many were computed and the index of the last one's logits."""
        self.release()
        n_same = _n_same(self.tokens, tokens[:-1])  # the last token always runs, for its logits
        del self.tokens[self.context.forget(0, n_same) :]
        fresh = tokens[len(self.tokens) :]
        return len(fresh), self.extend(fresh)

    def show(self, projector: Projector, prompt: str, images: Sequence[Path | bytes]) -> int:
        """Bring the sequence to a prompt with images; return the index of the last token's logits."""
        self.release()
        cached, self.tokens = self.tokens, []
        self.tokens, index = projector.evaluate(self.context, prompt, images=images, cached=cached)
        return index

    def extend(self, tokens: Sequence[int], *, every: bool = False) -> int:
        """Run tokens at the end; return the index of the last one's logits; see `Context.run`."""
        last = self.context.run(tokens, len(self.tokens), every=every)
        self.tokens += tokens
        return last

    def cut(self, n: int) -> None:
        """Keep the first n tokens: the others were guessed wrong."""
        if len(self.tokens) > n:
            del self.tokens[self.context.forget(0, n) :]

    def save(self, path: Path, key: dict[str, object]) -> None:
        """Write what the cache holds. `key` tells what a reader has to agree with for the state to be of use.

        Raises:
            ArtifactError: code "write-failed".
        """
        header = json.dumps(key | {"tokens": self.tokens}).encode()
        with replacing_file(path, mode=0o600) as temporary, temporary.open("wb") as file:  # it holds a conversation
            file.write(_MAGIC + struct.pack("<Q", len(header)) + header)
            file.write(self.context.read_state(0))

    def load(self, path: Path, key: dict[str, object]) -> int:
        """Return how many tokens of a saved state the cache now holds; 0 if the file is broken or has another key."""
        self.release()
        try:
            with path.open("rb") as file:
                if file.read(len(_MAGIC)) != _MAGIC:
                    return 0
                header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
                tokens = header.pop("tokens")
                if header != key or len(tokens) > self.n_ctx:
                    return 0
                state = file.read()
        except (OSError, ValueError, struct.error, KeyError, AttributeError):
            return 0
        self.clear()
        if not self.context.write_state(0, state):
            return 0
        self.tokens = tokens
        return len(tokens)


def _n_same(a: list[int], b: list[int]) -> int:
    """Return how many tokens two texts begin with in common."""
    n = min(len(a), len(b))
    if a[:n] == b[:n]:  # what a conversation mostly finds, at the speed of C
        return n
    return next(i for i in range(n) if a[i] != b[i])
