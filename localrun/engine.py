"""Run a GGUF: one stream of steps at linear cost, many sequences in one batch, or the logits of a text.

What the KV cache holds from the last call is kept as far as the new prompt begins with it, so that a conversation's
next turn computes only what is new. Left out on purpose: speculation, grammars and sessions on disk.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from ..errors import ModelError
from . import template
from .batching import complete_all
from .generation import Completion, FinishReason, Message, Sampling
from .hardware import default_threads
from .llama import Context, Entry, Model, Sampler
from .reading import Reading
from .thinking import Part, prompt_opens_thinking

_MAX_DEFAULT_CTX = 4096  # memory grows with it; a longer context is asked for
_N_BATCH = 512  # tokens that one call decodes at most
_ROOM_PER_SEQUENCE = 512  # tokens of KV cache for each of many sequences, on average


@dataclass(frozen=True)
class Step:
    """One generated token and the text that it let out, which may be empty or belong to earlier tokens.

    `token` is -1 where a token ends the thinking and begins the answer: its first text comes in a step before its own.
    `n_generated` and `n_reasoning` count tokens, the one that ends the turn included. `finish_reason` is set on the
    last step alone.
    """

    token: int
    text: str
    part: Part
    n_prompt: int
    n_generated: int
    n_reasoning: int
    closed: bool | None  # the thinking, so far; None if it never opened
    prompt_per_s: float  # tokens/s of the part of the prompt that the KV cache did not hold
    tokens_per_s: float
    finish_reason: FinishReason | None = None


class Engine:
    """A GGUF ready to answer. Close it, or use it as a context manager. It does one thing at a time."""

    def __init__(
        self, path: str | Path, *, n_ctx: int | None = None, n_threads: int | None = None, n_seq: int = 1
    ) -> None:
        """Load a file, with a context of n_ctx tokens for any one sequence.

        n_ctx None takes the model's own context, at most 4,096. With n_seq > 1 the sequences share a KV cache of
        n_ctx or of 512 tokens a sequence, whichever is more.

        Raises:
            ArtifactError, ModelError: see `llama.Model` and `llama.Context`.
        """
        self.path = Path(path)
        self.model = Model(self.path)
        self.metadata, self.n_vocab, self.n_ctx_train = self.model.metadata, self.model.n_vocab, self.model.n_ctx_train
        self.n_ctx = n_ctx or min(self.n_ctx_train or _MAX_DEFAULT_CTX, _MAX_DEFAULT_CTX)
        self.n_seq, self.n_threads = n_seq, n_threads or default_threads()
        n_cells = max(self.n_ctx, _ROOM_PER_SEQUENCE * n_seq if n_seq > 1 else 0)
        try:
            self._context = Context(self.model, n_cells, n_seq, self.n_threads, max(_N_BATCH, n_seq))
        except BaseException:
            self.model.close()
            raise
        self._cached: list[int] = []  # what sequence 0's KV cache holds
        self._turn = object()  # the call that the KV cache belongs to

    @property
    def eog(self) -> frozenset[int]:
        """The tokens that end generation."""
        return self.model.eog

    @property
    def size_bytes(self) -> int:
        """The file's size."""
        return self.path.stat().st_size

    def render(self, messages: Sequence[Message], *, thinking: bool = True) -> str:
        """Return the prompt that the file's own chat template makes of a conversation.

        Raises:
            ModelError: the file has no template, or the template refuses the conversation.
        """
        source = self.metadata.get("tokenizer.chat_template")
        if not source:
            raise ModelError(f"{self.path} has no chat template", "use an instruction-tuned model")
        bos, eos = (self._special_text(name) for name in ("bos", "eos"))
        return template.render(source, messages, thinking, bos, eos)

    def _special_text(self, name: str) -> str:
        token = self.metadata.get(f"tokenizer.ggml.{name}_token_id")
        return self.detokenize([int(token)]) if token is not None else ""

    def tokenize(self, text: str) -> list[int]:
        """Return the tokens of a rendered prompt: special tokens parsed, BOS put first where the file asks for it."""
        return self.model.tokenize(text)

    def detokenize(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, special tokens as they are written."""
        return b"".join(map(self.model.piece, tokens)).decode("utf-8", "replace")

    def stream(self, prompt: str | Sequence[int], sampling: Sampling) -> Iterator[Step]:
        """Yield a step a token until the model ends its turn, the limit, or the end of the context.

        Raises:
            ModelError: the prompt does not fit the context.
        """
        tokens = self.tokenize(prompt) if isinstance(prompt, str) else list(prompt)
        text = prompt if isinstance(prompt, str) else self.detokenize(tokens[-32:])
        self._check_fits(len(tokens))
        turn = self._turn = object()
        started = time.monotonic()
        n_new, at = self._prefill(tokens)
        prompt_per_s = n_new / max(time.monotonic() - started, 1e-9)
        started, n = time.monotonic(), 0
        limit = min(sampling.max_tokens, self.n_ctx - len(tokens))
        reading = Reading(prompt_opens_thinking(text), self.model.piece)
        sampler = Sampler(sampling, sampling.seed)
        finish: FinishReason | None = None
        try:
            while finish is None:
                token = sampler.sample(self._context, at)
                n += 1
                if token in self.eog:
                    finish, pieces = "stop", reading.finish()
                else:
                    pieces = reading.add(token)
                    if n >= limit:
                        finish, pieces = "length", pieces + reading.finish()
                rate = n / max(time.monotonic() - started, 1e-9)
                counts = (len(tokens), n, reading.n_reasoning, reading.closed, prompt_per_s, rate)
                *earlier, (part, out) = pieces or [(reading.part, "")]
                for part_before, out_before in earlier:
                    yield Step(-1, out_before, part_before, *counts)
                yield Step(token, out, part, *counts, finish)
                if self._turn is not turn:
                    raise RuntimeError("another call took over this engine in the middle of a stream")
                if finish is None:
                    self._extend([token])
                    at = 0
        finally:
            sampler.close()

    def _prefill(self, tokens: list[int]) -> tuple[int, int]:
        """Bring sequence 0 to `tokens`; return how many were computed and where the last one's logits stand."""
        same = 0
        for ours, wanted in zip(self._cached, tokens[:-1], strict=False):  # the last token is always run for its logits
            if ours != wanted:
                break
            same += 1
        del self._cached[self._context.forget(0, same) :]
        fresh, at = tokens[len(self._cached) :], 0
        for start in range(0, len(fresh), _N_BATCH):
            at = self._extend(fresh[start : start + _N_BATCH])
        return len(fresh), at

    def _extend(self, tokens: list[int], every: bool = False) -> int:
        """Run at most a batch of tokens at the end of sequence 0; return where the last one's logits stand."""
        base, last = len(self._cached), len(tokens) - 1
        if not self._context.decode([Entry(t, base + i, 0, every or i == last) for i, t in enumerate(tokens)]):
            raise ModelError(f"the context of {self.n_ctx} tokens is full", "give a larger --context")
        self._cached += tokens
        return last

    def _check_fits(self, n_prompt: int) -> None:
        if n_prompt == 0:
            raise ModelError("the prompt is empty")
        if n_prompt >= self.n_ctx:
            raise ModelError(
                f"the conversation takes {n_prompt} tokens and the context holds {self.n_ctx}",
                "give a larger --context, or begin a new conversation",
            )

    def generate_many(self, prompts: Sequence[str], sampling: Sampling) -> Iterator[tuple[int, Completion]]:
        """Yield (index, completion) as each ends, with up to n_seq sequences in one batch, refilled as they end.

        Request i is sampled with seed `sampling.seed + i`. A prompt that does not fit comes back with an error.
        Closing the iterator stops the work.
        """
        turn = self._turn = object()
        self._clear()
        try:
            for finished in complete_all(self._context, prompts, sampling, n_seq=self.n_seq, n_ctx=self.n_ctx):
                yield finished
                if self._turn is not turn:
                    raise RuntimeError("another call took over this engine in the middle of a batch")
        finally:
            if self._turn is turn:
                self._clear()

    def logits(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """Return the logits `[T, V]` that follow every token of a text.

        Raises:
            ModelError: the tokens do not fit the context.
        """
        if not 0 < len(tokens) <= self.n_ctx:
            raise ModelError(f"{len(tokens)} tokens do not fit the context of {self.n_ctx}", "give a larger --context")
        self._turn = object()
        self._clear()
        rows = np.empty((len(tokens), self.n_vocab), np.float32)
        for start in range(0, len(tokens), _N_BATCH):
            last = self._extend(list(tokens[start : start + _N_BATCH]), every=True)
            for i in range(last + 1):
                rows[start + i] = self._context.logits(i)
        return rows

    def _clear(self) -> None:
        for slot in range(self.n_seq):
            self._context.forget(slot)
        self._cached = []

    def close(self) -> None:
        """Free the cache and the weights. More than one call does no harm."""
        self._context.close()
        self.model.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
