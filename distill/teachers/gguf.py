"""A GGUF file as a teacher or as the model under evaluation: many sequences in one llama.cpp batch."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, tee
from pathlib import Path

from ...localrun.core.generation import Completion, Message, Sampling, TopLogprobs
from ...localrun.engine.engine import Engine
from ..records import Request
from .base import Teacher
from .vocabulary import of_gguf

_PARALLEL = 16
_MOST_CTX = 16384  # tokens for all sequences together, unless one alone needs more: the KV cache takes memory
_BLOCK_BYTES = 1 << 20

_Prompt = tuple[int, str, int]
"""The request's index, its rendered text and its seed."""


class GGUFTeacher(Teacher):
    """A GGUF file in this process, `n_parallel` sequences at a time; the context grows to what a call needs."""

    backend = "gguf"

    def __init__(self, path: Path, *, n_parallel: int | None = None, n_ctx: int | None = None) -> None:
        """Open the file, at first with a context of `n_ctx` tokens for all sequences together.

        Raises:
            ModelError: it is broken, or llama.cpp cannot run it.
        """
        self.n_parallel = n_parallel or _PARALLEL
        self.name = path.name
        self._engine = Engine(path, n_ctx=n_ctx, n_seq=self.n_parallel)
        self.revision, self.vocabulary = _file_hash(path), of_gguf(path)

    @property
    def n_ctx(self) -> int:
        """The context in tokens, of all sequences together, as far as it has grown."""
        return self._engine.n_ctx

    def generate(
        self, requests: Iterable[Request], sampling: Sampling, *, top_logprobs: int = 0
    ) -> Iterator[tuple[int, Completion]]:
        """Yield (index, completion) as sequences end. A request that needs a larger context waits for those before it.

        The first n_parallel requests decide the context.
        """
        source = ((i, self._engine.render(list(r.messages)), r.seed) for i, r in enumerate(requests))
        ahead: deque[_Prompt] = deque()
        while ahead := deque([*ahead, *islice(source, self.n_parallel - len(ahead))]):
            self._make_room(max(self._n_tokens(text, sampling) for _, text, _ in ahead), len(ahead))
            asked: list[int] = []  # the request's index for each that the engine was given
            texts, seeds = tee(self._fitting(ahead, source, sampling=sampling, asked=asked))
            for i, completion in self._engine.generate_many(
                (text for _, text, _ in texts), sampling, seeds=(seed for *_, seed in seeds), top_logprobs=top_logprobs
            ):
                yield asked[i], completion

    def _fitting(
        self, ahead: deque[_Prompt], source: Iterator[_Prompt], *, sampling: Sampling, asked: list[int]
    ) -> Iterator[_Prompt]:
        """Yield prompts until one needs a larger context, which goes back to `ahead`."""
        while prompt := ahead.popleft() if ahead else next(source, None):
            if self._n_tokens(prompt[1], sampling) > self._engine.n_ctx:
                ahead.appendleft(prompt)
                return
            asked.append(prompt[0])
            yield prompt

    def score(self, messages: Sequence[Message], answer: str | Sequence[int], *, top_logprobs: int) -> TopLogprobs:
        """Return the `top_logprobs` most probable tokens at each place of the answer."""
        prompt = self._engine.tokenize(self._engine.render(list(messages)))
        tokens = self._engine.model.tokenize(answer, whole=False) if isinstance(answer, str) else list(answer)
        self._make_room(len(prompt) + len(tokens), 1)
        return self._engine.top_logprobs([*prompt, *tokens], top_logprobs, len(prompt))

    def tokenize(self, text: str) -> list[int]:
        """Return the token ids of a text."""
        return self._engine.model.tokenize(text, whole=False)

    def _n_tokens(self, prompt: str, sampling: Sampling) -> int:
        """Return the context that an answer may take: 0 if the prompt alone is more than the model can read."""
        n_prompt, most = len(self._engine.tokenize(prompt)), self._engine.n_ctx_train or _MOST_CTX
        return min(n_prompt + sampling.max_tokens, most) if n_prompt < most else 0

    def _make_room(self, longest: int, n: int) -> None:
        """Open the file again if its context holds less than the longest of n sequences, or than all together."""
        wanted = max(longest, min(longest * n, _MOST_CTX))
        if wanted > self._engine.n_ctx:
            self._engine.close()
            self._engine = Engine(self._engine.path, n_ctx=wanted, n_seq=self.n_parallel)

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
