"""A loaded GGUF and its context through llama.cpp's C interface: decode a batch, read logits, turn text into tokens."""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from ...errors import ArtifactError, ModelError, UsageError
from ..core.closes import Closes
from ..families import template
from ..machine.hardware import default_threads
from ..machine.memory import KV_TYPES, N_BATCH, N_MICRO_BATCH
from .library import clear_log, has_amx, llama_cpp, logged_reason, start_library

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_BLOCK_BYTES = 1 << 20
_KV_FULL = 1  # llama_decode: no room in the KV cache
_NOT_THE_FILE = re.compile(r"unknown|unsupported|not supported|alloc|memory", re.I)  # reasons that no new copy mends


class Entry(NamedTuple):
    """One token of a batch; `wanted` asks for its logits."""

    token: int
    position: int
    sequence: int
    wanted: bool


def model_params(*, writable: bool = False) -> Any:
    """Return how to load a model; `writable` keeps its weights as the file has them, in memory of their own."""
    params = llama_cpp.llama_model_default_params()
    if has_amx():
        params.use_extra_bufts = False
    if writable:
        if hasattr(params, "load_mode"):
            params.load_mode = 0  # LLAMA_LOAD_MODE_NONE; older versions have a flag of its own
        else:
            params.use_mmap = False
        params.use_extra_bufts = False  # nothing repacked for the processor
    return params


class Model(Closes):
    """A loaded GGUF: its weights, vocabulary and metadata."""

    def __init__(self, path: Path, *, writable: bool = False) -> None:
        """Load a file; `writable` keeps its weights as the file has them, in memory of their own.

        Raises:
            ArtifactError: code "no-such-model", "not-gguf" or "gguf-broken".
            ModelError: code "load-failed": this llama.cpp cannot run it; the reason is its own.
        """
        check_file(path)
        start_library()
        self.path = path
        clear_log()
        self._handle = llama_cpp.llama_model_load_from_file(os.fsencode(path), model_params(writable=writable))
        if not self._handle:
            raise _load_error(path, logged_reason())
        self._vocab = llama_cpp.llama_model_get_vocab(self._handle)
        self.n_vocab = int(llama_cpp.llama_vocab_n_tokens(self._vocab))
        self.n_ctx_train = int(llama_cpp.llama_model_n_ctx_train(self._handle))
        self.metadata = self._read_metadata()
        self._pieces: dict[int, bytes] = {}

    @property
    def handle(self) -> Any:
        """The loaded model; the C functions would crash on one that was freed."""
        if not self._handle:
            raise ValueError("the model is closed")
        return self._handle

    @property
    def vocab(self) -> Any:
        """The vocabulary, which lives as long as the model."""
        return self._vocab if self.handle else None

    def _read_metadata(self) -> dict[str, str]:
        read: dict[str, str] = {}
        for i in range(llama_cpp.llama_model_meta_count(self.handle)):
            key = _text_of(llama_cpp.llama_model_meta_key_by_index, self.handle, i)
            read[key] = _text_of(llama_cpp.llama_model_meta_val_str_by_index, self.handle, i)
        return read

    @cached_property
    def hash(self) -> str:
        """A short hash of the file: its size, its beginning (the metadata), middle and end."""
        size = self.path.stat().st_size
        digest = hashlib.sha256(str(size).encode())
        with self.path.open("rb") as data:
            for start in (0, size // 2, max(0, size - _BLOCK_BYTES)):
                data.seek(start)
                digest.update(data.read(_BLOCK_BYTES))
        return digest.hexdigest()[:16]

    @cached_property
    def is_recurrent(self) -> bool:
        """Whether part of its state cannot be cut or shared, as in Mamba and its hybrids."""
        return bool(llama_cpp.llama_model_is_recurrent(self.handle) or llama_cpp.llama_model_is_hybrid(self.handle))

    def tokenize(self, text: str, whole: bool = True) -> list[int]:
        """Return the tokens of a rendered prompt: special tokens parsed, BOS put first where the file asks for it.

        A text that is not `whole` continues another one, so it gets no BOS.
        """
        data = text.encode("utf-8", "replace")
        tokens = self._tokenize(data, len(data) + 8)
        if not whole:
            return tokens
        bos = int(llama_cpp.llama_vocab_bos(self.vocab))
        wants_bos = bool(llama_cpp.llama_vocab_get_add_bos(self.vocab)) and bos >= 0
        return [bos, *tokens] if wants_bos and tokens[:1] != [bos] else tokens

    def _tokenize(self, data: bytes, size: int) -> list[int]:
        buffer = (llama_cpp.llama_token * size)()
        n = llama_cpp.llama_tokenize(self.vocab, data, len(data), buffer, size, False, True)
        return list(buffer[:n]) if n >= 0 else self._tokenize(data, -n)  # it returns how many it needs, negative

    def piece(self, token: int) -> bytes:
        """Return the bytes of one token, special tokens as they are written.

        Raises:
            ModelError: the vocabulary has no such token.
        """
        if token not in self._pieces:
            if not 0 <= token < self.n_vocab:
                raise ModelError(
                    f"{self.path} has no token {token}: its vocabulary holds {self.n_vocab}", code="no-such-token"
                )
            self._pieces[token] = self._read_piece(token, 64)
        return self._pieces[token]

    def _read_piece(self, token: int, size: int) -> bytes:
        buffer = ctypes.create_string_buffer(size)
        n = llama_cpp.llama_token_to_piece(self.vocab, token, buffer, size, 0, True)
        return buffer.raw[:n] if n >= 0 else self._read_piece(token, -n)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        thinking: bool = True,
        variables: Mapping[str, Any] = MappingProxyType({}),
        tools: Sequence[Mapping[str, Any]] | None = None,
        asks: bool = True,
    ) -> str:
        """Return a conversation as rendered by the file's own chat template; see `template.render`.

        Raises:
            ModelError: code "no-chat-template" or "template-refused".
        """
        source = self.metadata.get("tokenizer.chat_template")
        known = {f"{name}_token": self.special_text(name) for name in ("bos", "eos")} | dict(variables)
        return template.render(source, messages, thinking=thinking, variables=known, tools=tools, asks=asks)

    def special_text(self, name: str) -> str:
        """Return the text of the `bos` or the `eos` token, empty if the file names none."""
        token = self.metadata.get(f"tokenizer.ggml.{name}_token_id")
        return "" if token is None else self.piece(int(token)).decode("utf-8", "replace")

    @cached_property
    def eog(self) -> frozenset[int]:
        """The tokens that end generation."""
        return frozenset(t for t in range(self.n_vocab) if llama_cpp.llama_vocab_is_eog(self.vocab, t))

    def close(self) -> None:
        """Free the weights. More than one call does no harm."""
        if self._handle:
            llama_cpp.llama_model_free(self._handle)
            self._handle = self._vocab = None


def _context_params(n_ctx: int, n_seq: int, *, n_batch: int, kv_type: str, flash: bool | None) -> Any:
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_seq_max = n_ctx, n_seq
    params.n_batch = params.n_ubatch = n_batch
    params.n_threads = params.n_threads_batch = default_threads()
    params.kv_unified = params.no_perf = True
    params.type_k = params.type_v = int(KV_TYPES[kv_type])
    if hasattr(params, "n_outputs_max_per_seq"):
        params.n_outputs_max_per_seq = 0  # any number: `Engine.logits` wants every position's
    if flash is not None:
        params.flash_attn_type = int(flash)
    if flash is False:  # every attention score of a micro-batch is in memory
        params.n_ubatch = min(n_batch, N_MICRO_BATCH)
    return params


class Context(Closes):
    """A KV cache that all sequences share, and one batch, allocated once."""

    def __init__(
        self,
        model: Model,
        n_ctx: int,
        *,
        n_seq: int = 1,
        n_batch: int = N_BATCH,
        kv_type: str = "f16",
        flash: bool | None = None,
        on_eval: Callable[[int, bool], bool] | None = None,
    ) -> None:
        """Make room for n_ctx tokens in n_seq sequences, decoded at most n_batch at once, cached in one of `KV_TYPES`.

        `flash` is whether to use flash attention, None where llama.cpp decides; without it every attention score of 128
        tokens is there at once. `on_eval` is called with the address of every node of the graph; see
        `tensors.scheduler_callback`. It computes with `default_threads()` until `set_threads` says otherwise.

        Raises:
            ModelError: code "no-cache": not enough memory, or the model cannot have such a cache.
            UsageError: code "no-such-kv-type": there is no such type of cache.
        """
        if kv_type not in KV_TYPES:
            raise UsageError(f"no KV type {kv_type!r}", f"one of {', '.join(KV_TYPES)}", code="no-such-kv-type")
        params = _context_params(n_ctx, n_seq, n_batch=n_batch, kv_type=kv_type, flash=flash)
        if on_eval is not None:  # the C function lives as long as its Python object
            self._on_eval = type(params.cb_eval)(lambda node, is_asked, _: on_eval(node, is_asked))
            params.cb_eval = self._on_eval
        clear_log()
        self.model, self.n_seq, self.n_batch = model, n_seq, n_batch
        self._handle = llama_cpp.llama_init_from_model(model.handle, params)
        if not self._handle:
            hint = "give a smaller --context" if kv_type == "f16" else "give a smaller --context, or --kv-type f16"
            raise ModelError(f"no {kv_type} cache for {n_ctx} tokens: {logged_reason()}", hint, code="no-cache")
        self.n_ctx = int(llama_cpp.llama_n_ctx(self._handle))
        self._memory = llama_cpp.llama_get_memory(self._handle)
        self._batch = llama_cpp.llama_batch_init(n_batch, 0, 1)
        for i in range(n_batch):
            self._batch.n_seq_id[i] = 1

    @property
    def handle(self) -> Any:
        """The context; the C functions would crash on one that was freed."""
        if not self._handle:
            raise ValueError("the context is closed")
        return self._handle

    def decode(self, entries: Sequence[Entry]) -> bool:
        """Run a batch of at most n_batch entries; return False, with nothing changed, if the KV cache is full.

        Raises:
            ModelError: llama.cpp failed.
        """
        handle, batch = self.handle, self._batch
        assert len(entries) <= self.n_batch, "the batch would overflow"
        batch.n_tokens = len(entries)
        for i, (token, position, sequence, wanted) in enumerate(entries):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.seq_id[i][0] = sequence
        clear_log()
        code = llama_cpp.llama_decode(handle, batch)
        if code not in (0, _KV_FULL):
            raise ModelError(
                f"llama.cpp cannot decode (code {code}): {logged_reason()}",
                "give a smaller --context, or free some memory",
                code="decode-failed",
            )
        return bool(code == 0)

    def run(self, tokens: Sequence[int], start: int, *, sequence: int = 0, every: bool = False) -> int:
        """Decode tokens from a position on, in batches; return the index of the last one's logits in the last batch.

        With `every`, each token of a batch has logits.

        Raises:
            ModelError: code "context-full" or "decode-failed".
        """
        last = -1
        for begin in range(0, len(tokens), self.n_batch):
            part = tokens[begin : begin + self.n_batch]
            last = len(part) - 1
            entries = [Entry(t, start + begin + i, sequence, every or i == last) for i, t in enumerate(part)]
            if not self.decode(entries):
                raise self.full()
        return last

    def full(self) -> ModelError:
        """Return the error of a KV cache that has no more room."""
        message = f"the context of {self.n_ctx} tokens is full"
        return ModelError(message, "give a larger --context", code="context-full")

    def logits(self, index: int) -> npt.NDArray[np.float32]:
        """Return the logits `[V]` of one entry of the last batch: a view that the next batch overwrites."""
        import numpy as np  # what only samples does without

        row = llama_cpp.llama_get_logits_ith(self.handle, index)
        return np.ctypeslib.as_array(row, shape=(self.model.n_vocab,))

    @contextmanager
    def without(self, index: int, tokens: Collection[int]) -> Iterator[None]:
        """Make some tokens impossible in one entry of the last batch, for as long as the block lasts."""
        row = llama_cpp.llama_get_logits_ith(self.handle, index)
        kept = [(token, row[token]) for token in tokens]
        for token in tokens:
            row[token] = -math.inf
        try:
            yield
        finally:
            for token, logit in kept:
                row[token] = logit

    def forget(self, sequence: int, start: int = 0) -> int:
        """Drop a sequence's cache from a position on; return how many of its tokens stay."""
        assert self.handle
        if not llama_cpp.llama_memory_seq_rm(self._memory, sequence, start, -1):
            llama_cpp.llama_memory_seq_rm(self._memory, sequence, -1, -1)  # a recurrent state can only be dropped
        return min(start, int(llama_cpp.llama_memory_seq_pos_max(self._memory, sequence)) + 1)

    def set_threads(self, n: int) -> None:
        """Compute with n threads from now on."""
        llama_cpp.llama_set_n_threads(self.handle, n, n)

    def share(self, source: int, target: int, n: int) -> None:
        """Let a sequence begin with the first n tokens of another; their cells are shared, not copied."""
        assert self.handle
        llama_cpp.llama_memory_seq_cp(self._memory, source, target, 0, n)

    def read_state(self, sequence: int) -> bytes:
        """Return a sequence's part of the cache."""
        size = int(llama_cpp.llama_state_seq_get_size(self.handle, sequence))
        buffer = (ctypes.c_uint8 * size)()
        n = int(llama_cpp.llama_state_seq_get_data(self.handle, buffer, size, sequence))
        return bytes(memoryview(buffer)[:n])

    def write_state(self, sequence: int, state: bytes) -> bool:
        """Put a sequence's part of the cache back; return False if this context cannot take it."""
        self.forget(sequence)
        buffer = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
        clear_log()
        return bool(llama_cpp.llama_state_seq_set_data(self.handle, buffer, len(state), sequence))

    def close(self) -> None:
        """Free the cache. More than one call does no harm."""
        if self._handle:
            llama_cpp.llama_batch_free(self._batch)
            llama_cpp.llama_free(self._handle)
            self._handle = None


def _text_of(call: Any, handle: Any, index: int) -> str:
    size = 256
    while True:
        buffer = ctypes.create_string_buffer(size)
        n = call(handle, index, buffer, size)
        if n < size:
            return buffer.value.decode("utf-8", "replace")
        size = n + 1


def check_file(path: Path) -> None:
    """Refuse a missing or foreign file before llama.cpp reads it.

    Raises:
        ArtifactError: code "no-such-model": there is no such file; "not-gguf": it is another file.
    """
    hint = "deepdistill quantize makes one from a checkpoint folder"
    if not path.is_file():
        raise ArtifactError(f"no GGUF file at {path}", hint, code="no-such-model")
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror}", code="file-unreadable") from error
    if magic != b"GGUF":
        raise ArtifactError(f"{path} is not a GGUF file", hint, code="not-gguf")


def _load_error(path: Path, reason: str) -> ArtifactError | ModelError:
    reason = re.sub(r"^(error loading model: )?(\w+: )?", "", reason)
    if _NOT_THE_FILE.search(reason):
        hint = "a newer llama-cpp-python may be able to"
        return ModelError(f"cannot load {path}: {reason}", hint, code="load-failed")
    return ArtifactError(
        f"{path} is corrupt or cut short: {reason}", "download or quantize it again", code="gguf-broken"
    )
