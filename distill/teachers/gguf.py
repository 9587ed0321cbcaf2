"""A GGUF file as a teacher or as the model under evaluation: many sequences in one llama.cpp batch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from ...localrun.engine import Engine
from ...localrun.generation import Completion, Sampling
from .base import Request, Teacher

_PARALLEL = 16
_MOST_CTX = 16384  # tokens for all sequences together, unless one alone needs more: the KV cache is memory
_BLOCK_BYTES = 1 << 20


class GGUFTeacher(Teacher):
    """A GGUF file in this process, `n_parallel` sequences at a time; the context grows to what a call needs."""

    backend = "gguf"

    def __init__(self, path: Path, *, n_parallel: int | None = None) -> None:
        """Open the file.

        Raises:
            ModelError: it is broken, or llama.cpp cannot run it.
        """
        self.n_parallel = n_parallel or _PARALLEL
        self.name = path.name
        self._engine = Engine(path, n_seq=self.n_parallel)
        self.revision = _file_hash(path)

    def generate(
        self, requests: Iterable[Request], sampling: Sampling, *, top_logprobs: int = 0
    ) -> Iterator[tuple[int, Completion]]:
        """Yield (index, completion) as sequences end."""
        asked = list(requests)
        prompts = [self._engine.render(list(request.messages)) for request in asked]
        longest = max((len(self._engine.tokenize(prompt)) for prompt in prompts), default=0) + sampling.max_tokens
        wanted = max(longest, min(longest * min(self.n_parallel, len(prompts)), _MOST_CTX))
        if wanted > self._engine.n_ctx:
            self._engine.close()
            self._engine = Engine(self._engine.path, n_ctx=wanted, n_seq=self.n_parallel)
        yield from self._engine.generate_many(prompts, sampling, seeds=[request.seed for request in asked])

    def close(self) -> None:
        """Free the model."""
        self._engine.close()


def _file_hash(path: Path) -> str:
    """Return a short hash of the file's size, its beginning (the metadata), middle and end."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as data:
        for start in (0, size // 2, max(0, size - _BLOCK_BYTES)):
            data.seek(start)
            digest.update(data.read(_BLOCK_BYTES))
    return digest.hexdigest()[:16]
