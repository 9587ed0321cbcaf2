"""Run a GGUF: one stream of steps at linear cost, many sequences in one batch, or the logits of a text.

What the KV cache holds from the last call is kept as far as the new prompt begins with it, so that a conversation's
next turn computes only what is new; `save_state` keeps it on disk for another day.
"""

from __future__ import annotations

import itertools
import json
import os
import struct
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import ArtifactError, ModelError
from ..core.closes import Closes
from ..core.generation import FREE, Completion, FinishReason, Guidance, Sampling, TopLogprobs
from ..families import template
from ..families.thinking import Part, Think, steer_thinking, tags_of
from ..gguf.header import UnknownTypeError
from ..machine.hardware import best_threads, default_threads
from ..machine.memory import MAX_DEFAULT_CTX, N_BATCH, Footprint, fit_context, flash_attention, n_cells
from .batching import complete_all
from .llama import Context, Entry, Model, check_file, llama_version
from .logprobs import stack_rows, top_with
from .speculation import Latch, NgramDrafts, Propose
from .turn import Turn

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from .vision import Projector

_STATE_MAGIC = b"deepdistill-state-1\n"
_N_MEASURED, _MEASURED_S = 12, 1.0  # tokens made, and seconds taken, at most, to compare thread counts


@dataclass(frozen=True)
class Step:
    """One generated token and the text that it let out, which may be empty or belong to earlier tokens.

    `token` is -1 where a token ends the thinking and begins the answer: its first text comes in a step before its own.
    `n_generated` and `n_reasoning` count tokens, the one that ends the turn included. `finish_reason` is set on the
    last step alone. `note` says what the thinking budget or the loop guard has just done.
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
    note: str | None = None
    n_drafted_right: int = 0  # tokens so far that were guessed and only checked


class Engine(Closes):
    """A GGUF ready to answer. Close it, or use it as a context manager. It does one thing at a time."""

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
        share a KV cache of n_ctx or of 512 tokens a sequence, whichever is more. n_threads None takes the number that
        was measured to be the fastest for this file here. `kv_type` is one of `memory.KV_TYPES`. The model in
        `draft_path`, of the same vocabulary, guesses tokens where a turn speculates. `mmproj_path` is the
        projector with which the model sees images.

        Raises:
            ArtifactError, ModelError: see `llama.Model` and `llama.Context`; or it does not fit the memory.
            UsageError: there is no such KV type.
        """
        self.path = Path(path)
        footprint = _footprint(self.path)
        self.flash: bool | None = None
        if footprint:
            n_ctx = fit_context(footprint, kv_type, n_seq, n_ctx)
            self.flash = flash_attention(footprint, n_ctx, kv_type) if n_seq == 1 else None
        self.model = Model(self.path)
        self.metadata, self.n_vocab, self.n_ctx_train = self.model.metadata, self.model.n_vocab, self.model.n_ctx_train
        self.n_ctx = n_ctx or min(self.n_ctx_train or MAX_DEFAULT_CTX, MAX_DEFAULT_CTX)
        self.n_seq, self.tags, self.kv_type = n_seq, tags_of(self.metadata), kv_type
        self._draft: Engine | None = None
        self._projector: Projector | None = None
        try:
            # One sequence more than asked for holds what all prompts begin with.
            n_sequences, n_batch = n_seq + 1 if n_seq > 1 else 1, max(N_BATCH, n_seq)
            n_kv = n_cells(self.n_ctx, n_seq)
            self._context = Context(
                self.model, n_kv, n_sequences, n_threads or default_threads(), n_batch, kv_type, flash=self.flash
            )
            self.n_threads = n_threads or best_threads(self.path, self._seconds_with)
            self._context.set_threads(self.n_threads)
            if draft_path is not None:
                self._draft = _open_draft(Path(draft_path), self.model, self.n_ctx, self.n_threads)
            if mmproj_path is not None:
                from .vision import Projector

                self._projector = Projector(Path(mmproj_path), self.model, self.n_threads)
        except BaseException:
            self.model.close()
            raise
        self._cached: list[int] = []  # what sequence 0's KV cache holds
        self._turn = object()  # the call that the KV cache belongs to
        self._latch = Latch()  # short answers alone would never learn whether guessing pays

    def _seconds_with(self, n_threads: int) -> float:
        """Return the seconds a token takes, from a few of them, fewer where they are slow."""
        self._context.set_threads(n_threads)
        started, n = time.monotonic(), 0
        while n < _N_MEASURED and time.monotonic() - started < _MEASURED_S:
            self._context.decode([Entry(n % self.n_vocab, n, 0, True)])
            n += 1
        seconds = (time.monotonic() - started) / n
        self._context.forget(0)
        return seconds

    @property
    def eog(self) -> frozenset[int]:
        """The tokens that end generation."""
        return self.model.eog

    @property
    def size_bytes(self) -> int:
        """The file's size."""
        return self.path.stat().st_size

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
        """Return the prompt that the file's own chat template makes of a conversation, with tools in OpenAI's form.

        Raises:
            ModelError: the file has no template, or the template refuses the conversation.
        """
        source = self.metadata.get("tokenizer.chat_template")
        if not source:
            raise ModelError(f"{self.path} has no chat template", "use an instruction-tuned model")
        bos, eos = (self._special_text(name) for name in ("bos", "eos"))
        return template.render(source, messages, thinking, bos, eos, tools)

    def prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        think: Think = "auto",
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """Return the rendered conversation with its thinking opened (`on`) or closed (`off`) if the template did not.

        Raises:
            ModelError: see `render`.
        """
        return steer_thinking(self.render(messages, thinking=think != "off", tools=tools), think, self.tags)

    def _special_text(self, name: str) -> str:
        token = self.metadata.get(f"tokenizer.ggml.{name}_token_id")
        return self.detokenize([int(token)]) if token is not None else ""

    def tokenize(self, text: str) -> list[int]:
        """Return the tokens of a rendered prompt: special tokens parsed, BOS put first where the file asks for it."""
        return self.model.tokenize(text)

    def detokenize(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, special tokens as they are written."""
        return b"".join(map(self.model.piece, tokens)).decode("utf-8", "replace")

    def stream(
        self,
        prompt: str | Sequence[int],
        sampling: Sampling,
        guidance: Guidance = FREE,
        images: Sequence[Path | bytes] = (),
    ) -> Iterator[Step]:
        """Yield a step a token until the model ends its turn, the limit, or the end of the context.

        The prompt's text holds a `vision.MARKER` for each image (see `vision.with_images`).

        Raises:
            ArtifactError: an image is missing or broken.
            ModelError: the prompt does not fit the context, or the model sees no images.
            UsageError: the grammar does not parse.
        """
        _check_grammar(guidance, self.model)
        text = prompt if isinstance(prompt, str) else self.detokenize(prompt[-32:])
        owner = self._turn = object()
        started = time.monotonic()
        if images:
            tokens, at = self._see(text, images)
            n_new = len(tokens)
        else:
            tokens = self.tokenize(prompt) if isinstance(prompt, str) else list(prompt)
            self._check_fits(len(tokens))
            n_new, at = self._prefill(tokens)
        prompt_per_s = n_new / max(time.monotonic() - started, 1e-9)
        started = time.monotonic()
        limit = min(sampling.max_tokens, self.n_ctx - len(tokens))
        turn = Turn(self.model, text, sampling, guidance, seed=sampling.seed, limit=limit, tags=self.tags)
        propose: Propose | None = None
        if guidance.speculate and not self.model.is_recurrent and not images:
            propose = self._draft._propose if self._draft else NgramDrafts()
        draft, said, n_right = list[int](), list(tokens), 0
        spent, n_kept = 0.0, len(tokens)  # of the last batch: its seconds; how long the cache is without its draft
        try:
            while turn.finish_reason is None:
                token = turn.next_token(self._context, at)
                said.append(token)
                pieces = turn.add(token)
                reading, n = turn.reading, len(turn.tokens)
                rate = n / max(time.monotonic() - started, 1e-9)
                counts = (len(tokens), n, reading.n_reasoning, reading.closed, prompt_per_s, rate)
                guessed = at < len(draft) and draft[at] == token
                *earlier, (part, out) = pieces or [(reading.part, "")]
                for part_before, out_before in earlier:
                    yield Step(-1, out_before, part_before, *counts)
                n_right += guessed
                yield Step(token, out, part, *counts, turn.finish_reason, turn.take_note(), n_right)
                if self._turn is not owner:
                    raise RuntimeError("another call took over this engine in the middle of a stream")
                if guessed:
                    at += 1
                    n_kept += 1
                    continue
                self._cut(n_kept)
                if n > 1:
                    self._latch.record(len(draft), at, spent)
                if turn.finish_reason is not None:
                    break
                draft = []
                if propose and turn.can_speculate and (wanted := self._latch.n_wanted()):
                    draft = propose(said, min(wanted, limit - n, self.n_ctx - len(said)))
                began = time.monotonic()
                self._extend([token, *draft], every=bool(draft))
                spent, n_kept, at = time.monotonic() - began, n_kept + 1, 0
        finally:
            turn.close()
            if self._turn is owner:
                self._cut(n_kept)

    def _see(self, prompt: str, images: Sequence[Path | bytes]) -> tuple[list[int], int]:
        """Bring sequence 0 to a prompt with images; return what it holds and where the last logits stand."""
        if self._projector is None:
            raise ModelError(f"{self.path} sees no images", "give the projector that came with it: --mmproj FILE")
        cached, self._cached = self._cached, []
        held, at = self._projector.evaluate(self._context, prompt, images, cached)
        self._cached = list(held)
        return held, at

    def _cut(self, n: int) -> None:
        """Drop from the cache what was guessed wrong."""
        if len(self._cached) > n:
            del self._cached[self._context.forget(0, n) :]

    def _propose(self, tokens: Sequence[int], n: int) -> list[int]:
        """Return the n tokens that this model, as the draft of another, finds most likely next."""
        if len(tokens) + n >= self.n_ctx:
            return []
        _, at = self._prefill(list(tokens))
        proposed: list[int] = []
        while True:
            token = int(self._context.logits(at).argmax())
            proposed.append(token)
            if len(proposed) >= n or token in self.eog:
                return proposed
            at = self._extend([token])

    def _prefill(self, tokens: list[int]) -> tuple[int, int]:
        """Bring sequence 0 to `tokens`; return how many were computed and where the last one's logits stand."""
        same = _n_same(self._cached, tokens[:-1])  # the last token is always run for its logits
        del self._cached[self._context.forget(0, same) :]
        fresh, at = tokens[len(self._cached) :], 0
        for start in range(0, len(fresh), N_BATCH):
            at = self._extend(fresh[start : start + N_BATCH])
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

    def generate_many(
        self,
        prompts: Iterable[str],
        sampling: Sampling,
        guidance: Guidance = FREE,
        *,
        seeds: Iterable[int] | None = None,
        top_logprobs: int = 0,
    ) -> Iterator[tuple[int, Completion]]:
        """Yield (index, completion) as each ends, with up to n_seq sequences in one batch, refilled as they end.

        Prompts and seeds are drawn when there is a place for them. What the first n_seq prompts begin with is computed
        once. Speculation is not for batches: they are busy already. Prompt i is sampled with seed i, by default
        `sampling.seed + i`. With `top_logprobs` a completion holds that many log-probabilities a token. A prompt that
        does not fit comes back with an error. Closing the iterator stops the work.
        """
        _check_grammar(guidance, self.model)
        turn = self._turn = object()
        self._clear()
        try:
            for finished in complete_all(
                self._context,
                zip(prompts, itertools.count(sampling.seed) if seeds is None else seeds, strict=False),
                sampling,
                guidance,
                n_seq=self.n_seq,
                n_ctx=min(self.n_ctx, self.n_ctx_train or self.n_ctx),  # of one sequence; they share the cache
                tags=self.tags,
                top_logprobs=top_logprobs,
            ):
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
        import numpy as np

        rows = np.empty((len(tokens), self.n_vocab), np.float32)
        for i, row in enumerate(self._logit_rows(tokens)):
            rows[i] = row
        return rows

    def top_logprobs(self, tokens: Sequence[int], k: int, start: int = 1) -> TopLogprobs:
        """Return the k most probable tokens at the place of every token of a text from `start`, at least 1, on.

        The text's own token takes the last place where it is not among them.

        Raises:
            ModelError: the tokens do not fit the context.
        """
        rows = itertools.islice(self._logit_rows(tokens), start - 1, len(tokens) - 1)
        return stack_rows([top_with(row, k, token) for row, token in zip(rows, tokens[start:], strict=True)], k)

    def _logit_rows(self, tokens: Sequence[int]) -> Iterator[npt.NDArray[np.float32]]:
        """Yield the logits `[V]` that follow each token: views that are overwritten."""
        if not 0 < len(tokens) <= self.n_ctx:
            raise ModelError(f"{len(tokens)} tokens do not fit the context of {self.n_ctx}", "give a larger --context")
        self._turn = object()
        self._clear()
        for start in range(0, len(tokens), N_BATCH):
            last = self._extend(list(tokens[start : start + N_BATCH]), every=True)
            yield from (self._context.logits(i) for i in range(last + 1))

    def _clear(self) -> None:
        for slot in range(self.n_seq + 1 if self.n_seq > 1 else 1):
            self._context.forget(slot)
        self._cached = []

    def save_state(self, path: Path) -> None:
        """Write what the KV cache holds of the last stream, so that another process need not compute it again.

        Raises:
            ArtifactError: it cannot be written.
        """
        header = json.dumps(self._state_key() | {"tokens": self._cached}).encode()
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with temporary.open("wb") as file:
                file.write(_STATE_MAGIC + struct.pack("<Q", len(header)) + header)
                file.write(self._context.read_state(0))
            temporary.replace(path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise ArtifactError(f"cannot write {path}: {error.strerror}", "free some disk space") from error

    def load_state(self, path: Path) -> int:
        """Return how many tokens of a saved state the cache now holds; 0 if it is none, or another model's."""
        self._turn = object()
        try:
            with path.open("rb") as file:
                if file.read(len(_STATE_MAGIC)) != _STATE_MAGIC:
                    return 0
                header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
                tokens = header.pop("tokens")
                if header != self._state_key() or len(tokens) > self.n_ctx:
                    return 0
                state = file.read()
        except (OSError, ValueError, struct.error, KeyError, AttributeError):
            return 0
        self._clear()
        if not self._context.write_state(0, state):
            return 0
        self._cached = tokens
        return len(tokens)

    def _state_key(self) -> dict[str, object]:
        """What a state has to agree with to be of use."""
        return {"model": self.model.hash, "kv_type": self.kv_type, "flash": self.flash, "llama": llama_version()}

    def close(self) -> None:
        """Free the cache and the weights. More than one call does no harm."""
        self._turn = object()  # an answer that is dropped later must not touch them
        for part in (self._draft, self._projector):
            if part:
                part.close()
        self._context.close()
        self.model.close()


def _n_same(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many tokens two texts begin with in common."""
    n = min(len(a), len(b))
    if a[:n] == b[:n]:
        return n
    return next(i for i in range(n) if a[i] != b[i])


def _check_grammar(guidance: Guidance, model: Model) -> None:
    if guidance.grammar is not None:
        from .grammar import check_grammar

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


def _open_draft(path: Path, model: Model, n_ctx: int, n_threads: int) -> Engine:
    draft = Engine(path, n_ctx=n_ctx, n_threads=n_threads)
    probes = range(0, model.n_vocab, max(1, model.n_vocab // 64))
    if draft.n_vocab != model.n_vocab or any(draft.model.piece(t) != model.piece(t) for t in probes):
        draft.close()
        raise ModelError(f"{path} has another vocabulary than {model.path}", "a draft model has to share it")
    return draft
