"""A Hugging Face checkpoint, from a folder or the hub, as a teacher or as the model under evaluation.

Prompts are rendered with the checkpoint's own chat template, and generation stops at its own end-of-turn tokens. No
code from a checkpoint is ever run.
"""

from __future__ import annotations

import sys
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from transformers.cache_utils import DynamicCache

from ....errors import ModelError, UsageError
from ....localrun.core.generation import Completion, Message, Sampling, TopLogprobs
from ....localrun.families.thinking import CLOSE, prompt_opens_thinking, split_thinking
from ...device import NO_MEMORY, choose_device
from ...planning.kv_cache import kv_numbers
from ...pocket.families import check_source
from ...records import Backend, Request
from ...tokenizer import Tokenizer, ids_of, prompt_of, text_of
from ..base import Teacher
from ..vocabulary import of_tokenizer
from .batching import BatchDecoder, SequenceState, new_sequence
from .loading import check_folder, load_model, load_tokenizer, weights_hash
from .paged import PagedCacheError, PagedDecoder, Pages, can_page
from .sampling import top_with
from .scoring import score_rows

_USUAL_LENGTH = 1024  # tokens of a row, for a first estimate of the memory before its limit is known
_PROMPT_ROOM = 256  # tokens
_BATCH_TOKENS = {"cuda": 16384, "cpu": 2048}


class TransformersTeacher(Teacher):
    """A causal language model of `transformers`, decoded in batches of `batch_size` rows."""

    pass_tokens = 1024
    """Tokens of one long text that are scored in one pass: bounds the memory of their logits."""

    def __init__(
        self,
        source: str | Path,
        *,
        name: str | None = None,
        backend: Backend = "transformers",
        device: str = "auto",
        batch_size: int | None = None,
        offline: bool = False,
        pages: Pages | None = None,
    ) -> None:
        """Load a folder or a hub id. `pages` asks for a paged cache; without it dense models have one on CUDA.

        Raises:
            ModelError: see `load_model` and `check_folder`.
            UsageError: `code` "no-such-device" or "number-out-of-range".
        """
        if batch_size is not None and batch_size < 1:
            raise UsageError(f"a batch holds at least one row, not {batch_size}", code="number-out-of-range")
        self.name, self.backend = name or str(source), backend
        self.device = choose_device(device)
        is_folder = isinstance(source, Path) or Path(source).is_dir()
        if is_folder:
            check_folder(Path(source))
        self.tokenizer = load_tokenizer(source, offline or is_folder)
        self.model = load_model(source, self.device, offline or is_folder)
        self.revision = weights_hash(Path(source)) if is_folder else getattr(self.model.config, "_commit_hash", None)
        self.eos_ids = _eos_ids(self.model, self.tokenizer)
        self.n_ctx: int | None = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        self.pages = pages or (Pages() if self.device.type == "cuda" and can_page(self.model) else None)
        self.batch_tokens = _BATCH_TOKENS.get(self.device.type, _BATCH_TOKENS["cpu"])
        """Tokens, padding included, of several texts that are scored in one pass."""
        self._batch_size = batch_size
        self.n_parallel = batch_size or self._rows_of(_USUAL_LENGTH)

    def generate(
        self, requests: Iterable[Request], sampling: Sampling, *, top_logprobs: int = 0
    ) -> Iterator[tuple[int, Completion]]:
        """Yield (index, completion) as rows end; prompts that leave no room in the context come back as errors."""
        opened: dict[int, bool] = {}  # by index: whether the prompt opens the thinking
        rows = self._rows(requests, sampling, opened)
        try:
            for row in self._decode_rows(rows, sampling, top_logprobs):
                yield row.index, self._completion(row, opened.pop(row.index))
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not NO_MEMORY.search(str(error)):
                raise
            raise ModelError(
                f"{self.name} ran out of memory with {self.n_parallel} rows",
                "lower --batch-size",
                code="out-of-memory",
            ) from error

    def _rows(
        self, requests: Iterable[Request], sampling: Sampling, opened: dict[int, bool]
    ) -> Iterator[SequenceState]:
        """Yield a row for each request; one that cannot be answered has no room for a token."""
        for index, request in enumerate(requests):
            prompt = self.render(request.messages)
            ids = self.tokenize(prompt)
            room = sampling.max_tokens if self.n_ctx is None else self.n_ctx - len(ids)
            opened[index] = prompt_opens_thinking(prompt)
            limit = max(0, min(room, sampling.max_tokens)) if ids else 0
            yield new_sequence(index, ids, max_new=limit, sampling=sampling, seed=request.seed)

    def _decode_rows(
        self, rows: Iterator[SequenceState], sampling: Sampling, top_logprobs: int
    ) -> Iterator[SequenceState]:
        """Yield rows as they end, from a paged cache where that is faster, otherwise from `BatchDecoder`."""
        pad = self.tokenizer.pad_token_id
        if self.pages and not top_logprobs:
            decoder = PagedDecoder(model=self.model, batch_size=self.n_parallel, eos_ids=self.eos_ids, pages=self.pages)
            try:
                yield from decoder.run(rows, sampling)
                return
            except PagedCacheError as error:
                self.pages, rows = None, chain(error.rows, rows)
                self.on_note(f"transformers' paged cache refuses {self.name} ({error}): it is decoded without one")
        longest = min(_PROMPT_ROOM + sampling.max_tokens, self.n_ctx or sys.maxsize)
        n_rows = self._batch_size or min(self.n_parallel, self._rows_of(longest))
        batch = BatchDecoder(self.model, batch_size=n_rows, eos_ids=self.eos_ids, pad_id=pad or 0)
        yield from batch.run(rows, sampling, top_logprobs)

    @torch.inference_mode()
    def score(self, messages: Sequence[Message], answer: str | Sequence[int], *, top_logprobs: int) -> TopLogprobs:
        """Return the `top_logprobs` most probable tokens at each place of the answer, in bounded passes."""
        prompt = self.tokenize(self.render(messages))
        ids = [*prompt, *(self.tokenize(answer) if isinstance(answer, str) else answer)]
        if self.n_ctx is not None and len(ids) > self.n_ctx:
            raise ModelError(
                f"the text takes {len(ids)} tokens and the context of {self.name} holds {self.n_ctx}",
                "give a shorter text",
                code="context-too-small",
            )
        cache, top = DynamicCache(config=self.model.config), []
        following = torch.tensor([*ids[1:], ids[-1]], device=self.model.device)  # nothing follows the last
        for start in range(0, len(ids), self.pass_tokens):
            chunk = torch.tensor([ids[start : start + self.pass_tokens]], device=self.model.device)
            end = start + chunk.shape[1]
            n_wanted = max(1, min(chunk.shape[1], end - len(prompt) + 1))  # the prompt's last token begins the answer
            output = self.model(input_ids=chunk, past_key_values=cache, use_cache=True, logits_to_keep=n_wanted)
            if end >= len(prompt):
                found = top_with(output.logits[0], top_logprobs, following[end - n_wanted : end])
                top.append([part.cpu() for part in found])
        tokens, values = (torch.cat(part)[:-1].numpy() for part in zip(*top, strict=True))
        return TopLogprobs(tokens, values)

    def score_many(
        self, conversations: Sequence[tuple[Sequence[Message], Sequence[int]]], *, top_logprobs: int
    ) -> Iterator[tuple[int, TopLogprobs]]:
        """Yield (index, what `score` returns), several conversations a pass; a long one goes alone, in parts."""
        rows = [(self.tokenize(self.render(messages)), list(answer)) for messages, answer in conversations]
        short = [i for i, row in enumerate(rows) if sum(map(len, row)) <= self.pass_tokens]
        pad = self.tokenizer.pad_token_id
        scored = score_rows(
            self.model, [rows[i] for i in short], k=top_logprobs, pad_id=pad or 0, max_tokens=self.batch_tokens
        )
        for i, top in scored:
            yield short[i], top
        for i in sorted(set(range(len(rows))) - set(short)):
            yield i, self.score(*conversations[i], top_logprobs=top_logprobs)

    @cached_property
    def vocabulary(self) -> str:  # type: ignore[override]
        """The fingerprint of its tokens."""
        return of_tokenizer(self.tokenizer)

    def tokenize(self, text: str) -> list[int]:
        """Return the token ids of a text."""
        return ids_of(self.tokenizer, text)

    def _rows_of(self, length: int) -> int:
        """Return how many rows to decode at once: a pass reads all weights, so on a CPU as many as fit the memory."""
        if self.device.type == "cuda":
            return 256 if self.pages else 128
        n_numbers, _ = kv_numbers(self.model.config.get_text_config().to_dict())
        row_bytes = length * n_numbers * self.model.dtype.itemsize
        return int(min(256, max(8, psutil.virtual_memory().available // 4 // row_bytes)))

    def render(self, messages: Sequence[Message]) -> str:
        """Return the prompt that the checkpoint's chat template makes of a conversation.

        Raises:
            ModelError: `code` "no-chat-template" or "template-refused".
        """
        try:
            return prompt_of(self.tokenizer, messages)
        except ModelError:
            if messages[0]["role"] == "system" and len(messages) > 1:  # not every template takes a system turn
                begin = f"{messages[0]['content']}\n\n{messages[1]['content']}"
                return self.render([{"role": messages[1]["role"], "content": begin}, *messages[2:]])
            raise

    def accepts(self, problem_source: str) -> None:
        """Refuse problems that the pocket teacher never learned; any other model may try anything."""
        if self.backend == "pocket":
            check_source(problem_source)

    def close(self) -> None:
        """Free the weights."""
        self.model = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _completion(self, row: SequenceState, starts_inside: bool) -> Completion:
        if row.max_new < 1:
            return _refused(len(row.prompt), self.n_ctx)
        kept = row.tokens[:-1] if row.ended else row.tokens
        reasoning, content, closed = split_thinking(text_of(self.tokenizer, kept), starts_inside)
        n_reasoning = 0 if closed is None else len(kept)
        if closed:
            n_reasoning = self._count_through_close(kept)
        return Completion(
            content=content,
            reasoning_content=reasoning,
            closed=closed,
            finish_reason="stop" if row.ended else "length",
            prompt_tokens=len(row.prompt),
            completion_tokens=len(row.tokens),
            reasoning_tokens=n_reasoning,
            seconds=row.seconds,
            token_ids=tuple(row.tokens),
            logprobs=row.logprobs,
        )

    def _count_through_close(self, ids: Sequence[int]) -> int:
        """Return how many tokens it takes until the text holds the closing tag, by bisection."""
        return bisect_left(range(len(ids)), True, key=lambda n: CLOSE in text_of(self.tokenizer, ids[:n]))


def _eos_ids(model: Any, tokenizer: Tokenizer) -> frozenset[int]:
    configured = model.generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    return frozenset(i for i in [*ids, tokenizer.eos_token_id] if i is not None)


def _refused(n_prompt: int, n_ctx: int | None) -> Completion:
    error = "the prompt is empty" if not n_prompt else f"the prompt's {n_prompt} tokens fill the context of {n_ctx}"
    return Completion("", None, None, "error", n_prompt, 0, 0, 0.0, error=error)
