"""Run a GGUF: one stream of steps at linear cost, many sequences in one batch, or the logits of a text."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import ModelError
from ..core.closes import Closes
from ..core.generation import FREE, GREEDY, Completion, Guidance, Sampling, TopLogprobs
from ..families.thinking import Think, steer_thinking, tags_of
from ..gguf.header import UnknownTypeError
from ..machine.hardware import best_threads
from ..machine.memory import MAX_DEFAULT_CTX, N_BATCH, Footprint, fit_context, flash_attention, n_cells
from .batching import Batch
from .grammar import check_grammar
from .kv_cache import KVCache
from .library import llama_version
from .llama import Context, Model, check_file
from .logprobs import logit_rows, stack_rows, top_with
from .speculation import Latch, ModelDrafts, NgramDrafts, Propose
from .stream import Step, stream_turn
from .turn import Turn

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from .vision import Projector

_N_MEASURED, _MEASURED_S = 12, 1.0  # tokens made, and seconds taken, at most, to compare thread counts


class Engine(Closes):
    """A GGUF ready to answer. Close it, or use it as a context manager. It runs one call at a time.

    >>> from deepdistill import Engine
    >>> question = "State the final answer to the following arithmetic problem: 4 - 1 ="
    >>> with Engine("model.gguf") as engine:
    ...     prompt = engine.prompt([{"role": "user", "content": question}])
    ...     steps = list(engine.stream(prompt))
    >>> "".join(step.text for step in steps if step.part == "answer")
    '3'
    """

    def __init__(
        self,
        path: str | Path,
        *,
        n_ctx: int | None = None,
        n_threads: int | None = None,
        n_seq: int = 1,
        kv_type: str = "f16",
        draft_path: str | Path | None = None,
        mmproj_path: str | Path | None = None,
    ) -> None:
        """Load a file, with a context of n_ctx tokens for any one sequence.

        n_ctx None takes the model's own context, as far as memory allows, at most 8,192. With n_seq > 1 the sequences
        share a KV cache of n_ctx or of 512 tokens each, whichever is more. n_threads None takes the number that was
        measured to be the fastest for this file on this machine. `kv_type` is one of `memory.KV_TYPES`. The model in
        `draft_path`, of the same vocabulary, guesses tokens where a turn speculates. `mmproj_path` is the
        projector with which the model sees images.

        Raises:
            ArtifactError, ModelError, UsageError: see `fit_context`, `llama.Model`, `llama.Context` and `Projector`;
                ModelError, code "vocabulary-mismatch": the draft model has another vocabulary.
        """
        self.path, self.n_seq, self.kv_type = Path(path), n_seq, kv_type
        footprint = _footprint(self.path)
        self.flash: bool | None = None
        if footprint:
            n_ctx = fit_context(footprint, kv_type, n_seq=n_seq, wanted=n_ctx)
            self.flash = flash_attention(footprint, n_ctx, kv_type=kv_type) if n_seq == 1 else None
        self.model = Model(self.path)
        self.metadata, self.n_vocab, self.n_ctx_train = self.model.metadata, self.model.n_vocab, self.model.n_ctx_train
        self.n_ctx = n_ctx or min(self.n_ctx_train or MAX_DEFAULT_CTX, MAX_DEFAULT_CTX)
        self.tags = tags_of(self.metadata)
        self._draft: Engine | None = None
        self._projector: Projector | None = None
        self._latch = Latch()  # kept from answer to answer: short ones alone would never learn whether guessing pays
        try:
            self._context = Context(
                self.model,
                n_cells(self.n_ctx, n_seq),
                n_seq=n_seq + 1 if n_seq > 1 else 1,  # one more holds what all prompts begin with
                n_batch=max(N_BATCH, n_seq),
                kv_type=kv_type,
                flash=self.flash,
            )
            self._cache = KVCache(self._context, self.n_ctx)
            self.n_threads = n_threads or best_threads(self.path, self._seconds_with)
            self._context.set_threads(self.n_threads)
            if draft_path is not None:
                self._draft = self._open_draft(Path(draft_path))
            if mmproj_path is not None:
                from .vision import Projector

                self._projector = Projector(Path(mmproj_path), self.model, self.n_threads)
        except BaseException:
            self.model.close()
            raise

    def _open_draft(self, path: Path) -> Engine:
        draft = Engine(path, n_ctx=self.n_ctx, n_threads=self.n_threads)
        probes = range(0, self.n_vocab, max(1, self.n_vocab // 64))
        if draft.n_vocab != self.n_vocab or any(draft.model.piece(t) != self.model.piece(t) for t in probes):
            draft.close()
            raise ModelError(
                f"{path} has another vocabulary than {self.path}",
                "a draft model has to share it",
                code="vocabulary-mismatch",
            )
        return draft

    def _seconds_with(self, n_threads: int) -> float:
        """Return the seconds a token takes, from a few of them, fewer where they are slow."""
        self._context.set_threads(n_threads)
        started, n = time.monotonic(), 0
        while n < _N_MEASURED and time.monotonic() - started < _MEASURED_S:
            self._context.run([n % self.n_vocab], n)
            n += 1
        seconds = (time.monotonic() - started) / n
        self._context.forget(0)
        return seconds

    @property
    def eog(self) -> frozenset[int]:
        """The tokens that end generation."""
        return self.model.eog

    @property
    def sees_images(self) -> bool:
        """Whether a projector is loaded."""
        return self._projector is not None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        thinking: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """Return a conversation, with tools in OpenAI's form, as rendered by the file's own chat template.

        Raises:
            ModelError: code "no-chat-template" or "template-refused".
        """
        return self.model.render(messages, thinking=thinking, tools=tools)

    def prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        think: Think = "auto",
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """Return the rendered conversation, its thinking opened (`on`) or closed (`off`) if the template did not do so.

        Raises:
            ModelError: see `render`.
        """
        return steer_thinking(self.render(messages, thinking=think != "off", tools=tools), think, self.tags)

    def tokenize(self, text: str) -> list[int]:
        """Return the tokens of a rendered prompt: special tokens parsed, BOS put first where the file asks for it."""
        return self.model.tokenize(text)

    def detokenize(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, special tokens as they are written."""
        return b"".join(map(self.model.piece, tokens)).decode("utf-8", "replace")

    def stream(
        self,
        prompt: str | Sequence[int],
        sampling: Sampling = GREEDY,
        *,
        guidance: Guidance = FREE,
        images: Sequence[Path | bytes] = (),
    ) -> Iterator[Step]:
        """Yield one step per token, until the model ends its turn or the limit or the context is reached.

        The prompt's text holds a `vision.MARKER` for each image (see `vision.with_images`).

        Raises:
            ArtifactError: an image is missing or broken, see `Projector.evaluate`.
            ModelError: code "prompt-too-long", "prompt-empty", "context-full" or "no-projector".
            UsageError: code "grammar-broken" or "schema-unsupported".
        """
        _check_constraint(guidance, self.model)
        text = prompt if isinstance(prompt, str) else self.detokenize(prompt[-32:])
        started = time.monotonic()
        if images:
            index = self._show(text, images)
            n_computed = len(self._cache.tokens)
        else:
            tokens = self.tokenize(prompt) if isinstance(prompt, str) else list(prompt)
            self._check_fits(len(tokens))
            n_computed, index = self._cache.prefill(tokens)
        prompt_per_s = n_computed / max(time.monotonic() - started, 1e-9)
        limit = min(sampling.max_tokens, self.n_ctx - len(self._cache.tokens))
        turn = Turn(
            self.model, text, sampling=sampling, guidance=guidance, seed=sampling.seed, limit=limit, tags=self.tags
        )
        propose: Propose | None = None
        if guidance.speculate and not self.model.is_recurrent and not images:
            propose = ModelDrafts(self._draft._cache, self._draft.eog) if self._draft else NgramDrafts()
        yield from stream_turn(
            turn, self._cache, index=index, prompt_per_s=prompt_per_s, propose=propose, latch=self._latch
        )

    def _show(self, prompt: str, images: Sequence[Path | bytes]) -> int:
        if self._projector is None:
            raise ModelError(
                f"{self.path} cannot see images",
                "give the projector that came with it: --mmproj FILE",
                code="no-projector",
            )
        return self._cache.show(self._projector, prompt, images)

    def _check_fits(self, n_prompt: int) -> None:
        if n_prompt == 0:
            raise ModelError("the prompt is empty", code="prompt-empty")
        if n_prompt >= self.n_ctx:
            raise ModelError(
                f"the conversation takes {n_prompt} tokens and the context holds {self.n_ctx}",
                "give a larger --context, or begin a new conversation",
                code="prompt-too-long",
            )

    def generate_many(
        self,
        prompts: Iterable[str],
        sampling: Sampling,
        *,
        guidance: Guidance = FREE,
        seeds: Iterable[int] | None = None,
        top_logprobs: int = 0,
    ) -> Iterator[tuple[int, Completion]]:
        """Yield (index, completion) as each ends, with up to n_seq sequences in one batch, refilled as they end.

        Prompts and seeds are drawn when there is a place for them. What the first n_seq prompts begin with is computed
        once. Batches do not speculate: they are busy already. Prompt i is sampled with seed i, by default
        `sampling.seed + i`. With `top_logprobs` a completion holds that many log-probabilities a token. A prompt that
        does not fit comes back with an error. Closing the iterator stops the work.
        """
        _check_constraint(guidance, self.model)
        self._cache.clear()
        owner = self._cache.owner
        batch = Batch(
            self._context,
            sampling,
            guidance,
            n_seq=self.n_seq,
            n_ctx=min(self.n_ctx, self.n_ctx_train or self.n_ctx),  # of one sequence; they share the cache
            tags=self.tags,
            top_logprobs=top_logprobs,
        )
        try:
            for finished in batch.complete(
                zip(prompts, itertools.count(sampling.seed) if seeds is None else seeds, strict=False)
            ):
                yield finished
                if self._cache.owner is not owner:
                    raise RuntimeError("another call took over this engine in the middle of a batch")
        finally:
            if self._cache.owner is owner:
                self._cache.clear()

    def logits(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """Return the logits `[T, V]` that follow every token of a text.

        Raises:
            ModelError: code "prompt-too-long".
        """
        import numpy as np

        rows = np.empty((len(tokens), self.n_vocab), np.float32)
        self._cache.clear()
        for i, row in enumerate(logit_rows(self._context, tokens)):
            rows[i] = row
        return rows

    def top_logprobs(self, tokens: Sequence[int], k: int, start: int = 1) -> TopLogprobs:
        """Return the k most probable tokens at each position of a text from `start` on, which is at least 1.

        The text's own token takes the last place if it is not among them.

        Raises:
            ModelError: code "prompt-too-long".
        """
        self._cache.clear()
        rows = logit_rows(self._context, tokens[:-1], start - 1)
        return stack_rows([top_with(row, k, token) for row, token in zip(rows, tokens[start:], strict=True)], k)

    def save_state(self, path: Path) -> None:
        """Write what the KV cache holds of the last stream, so that another process need not compute it again.

        Raises:
            ArtifactError: code "write-failed".
        """
        self._cache.save(path, self._state_key())

    def load_state(self, path: Path) -> int:
        """Return how many tokens of a saved state the cache now holds; 0 if the file is broken or another model's."""
        return self._cache.load(path, self._state_key())

    def _state_key(self) -> dict[str, object]:
        return {"model": self.model.hash, "kv_type": self.kv_type, "flash": self.flash, "llama": llama_version()}

    def close(self) -> None:
        """Free the cache and the weights. More than one call does no harm."""
        self._cache.release()  # an answer that is dropped later must not touch them
        for part in (self._draft, self._projector):
            if part:
                part.close()
        self._context.close()
        self.model.close()


def _check_constraint(guidance: Guidance, model: Model) -> None:
    if guidance.schema is not None:
        from .json_schema import check_schema

        check_schema(guidance.schema)
    elif guidance.grammar is not None:
        check_grammar(guidance.grammar, model)


def _footprint(path: Path) -> Footprint | None:
    """Return what a file takes; None where it has types that only llama.cpp may know.

    Raises:
        ArtifactError: it is missing or malformed; llama.cpp is not let near it.
    """
    check_file(path)
    try:
        return Footprint.of(path)
    except UnknownTypeError:
        return None
