"""How much of this machine's memory a GGUF takes, computed from its header before anything is loaded.

llama.cpp finds out while it allocates, and by then the system swaps or kills the process. The sum has three terms:
the weights, the KV cache, which grows with the context, and the buffers of one batch, where the logits weigh most.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import ModelError, UsageError
from ..core.text import format_bytes
from ..gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from ..gguf.header import Header, read_gguf
from ..gguf.split import other_shards
from . import hardware
from .hardware import gpus

KV_TYPES = {
    "f16": GGMLQuantizationType.F16,
    "q8_0": GGMLQuantizationType.Q8_0,
    "q4_0": GGMLQuantizationType.Q4_0,
}
"""Types that the KV cache may have, the most exact first."""
MAX_DEFAULT_CTX = 8192  # tokens: a model that thinks needs them; a user has to ask for more
ROOM_PER_SEQUENCE = 512  # tokens of KV cache for each of many sequences, on average
N_BATCH = 512  # tokens that one call decodes at most
N_MICRO_BATCH = 128  # of these, tokens computed at once where every attention score is kept

_CELLS = 256  # llama.cpp rounds a KV cache up to a multiple
_SPARE = 0.1  # share of the free memory to leave: other programs grow, and swapping costs more than a shorter context


@dataclass(frozen=True)
class Footprint:
    """The memory that a file needs.

    `kv_rows` holds (heads, head width) of each row that one token adds to the KV cache: a key and a value a layer; with
    latent attention (DeepSeek) one latent row, of which the value is a part. Sliding-window layers count in full: that
    is how llama.cpp keeps them by default, since a window could not return to an earlier turn.
    """

    path: Path
    n_ctx_train: int  # 0 if the file does not say
    n_embd: int
    n_head: int
    n_vocab: int
    kv_rows: tuple[tuple[int, int], ...]
    sliding_window: int | None  # tokens
    weight_bytes: int
    read_bytes: int  # of the weights, to generate one token

    @classmethod
    def of(cls, path: Path, header: Header | None = None) -> Footprint:
        """Read a file's header.

        Raises:
            ArtifactError: see `read_gguf`.
        """
        header = header or read_gguf(path)
        about = {
            name.partition(".")[2]: value
            for name, value in header.metadata.items()
            if name.startswith(f"{header.metadata.get('general.architecture')}.")
        }
        vocabulary = header.metadata.get("tokenizer.ggml.tokens") or range(_number(about.get("vocab_size")))
        parts = [header, *map(read_gguf, other_shards(path))]
        tensors = {name: tensor.n_bytes for part in parts for name, tensor in part.tensors.items()}
        return cls(
            path=path,
            n_ctx_train=_number(about.get("context_length")),
            n_embd=_number(about.get("embedding_length")),
            n_head=_most(about.get("attention.head_count", 0)),
            n_vocab=len(vocabulary),
            kv_rows=tuple(_kv_rows(about)),
            sliding_window=_number(about.get("attention.sliding_window")) or None,
            weight_bytes=sum(tensors.values()),
            read_bytes=_read_bytes(tensors, about),
        )

    def kv_bytes_per_token(self, kv_type: str = "f16") -> int:
        """Return the bytes that one token takes in the KV cache.

        Raises:
            UsageError: code "no-such-kv-type", or "kv-type-unfit": the heads' width is not a multiple of its block.
        """
        if kv_type not in KV_TYPES:
            raise UsageError(f"no KV type {kv_type!r}", f"one of {', '.join(KV_TYPES)}", code="no-such-kv-type")
        block, block_bytes = GGML_QUANT_SIZES[KV_TYPES[kv_type]]
        for _, width in self.kv_rows:
            if width % block:
                raise UsageError(
                    f"the KV cache of {self.path.name} cannot be {kv_type}: "
                    f"its heads are {width} wide, which is not a multiple of {block}",
                    "keep it in f16",
                    code="kv-type-unfit",
                )
        return sum(n_heads * width // block * block_bytes for n_heads, width in self.kv_rows)

    def kv_types(self) -> list[str]:
        """Return the KV types that fit the heads' width, the most exact first."""
        blocks = {name: GGML_QUANT_SIZES[type_][0] for name, type_ in KV_TYPES.items()}
        return [name for name, block in blocks.items() if all(width % block == 0 for _, width in self.kv_rows)]

    def total_bytes(self, n_ctx: int, kv_type: str = "f16", n_seq: int = 1) -> int:
        """Return the bytes that the model takes with a context of n_ctx tokens for any one of n_seq sequences.

        The batch's buffers are an upper bound with flash attention, which llama.cpp uses where it can.
        """
        cells = -(-n_cells(n_ctx, n_seq) // _CELLS) * _CELLS
        return self._fixed_bytes(n_seq) + cells * self._bytes_per_cell(kv_type, n_seq)

    def score_bytes(self, n_ctx: int) -> int:
        """Return the extra bytes of one sequence without flash attention: a micro-batch's scores and their softmax."""
        return 2 * 4 * self.n_head * N_MICRO_BATCH * -(-n_ctx // _CELLS) * _CELLS

    def max_ctx(self, available: int, kv_type: str = "f16", n_seq: int = 1) -> int:
        """Return the longest context that fits in so many bytes, a multiple of 256; 0 if none does."""
        room = _usable(available) - self._fixed_bytes(n_seq)
        cells = max(0, room) // self._bytes_per_cell(kv_type, n_seq) // _CELLS * _CELLS
        return cells if cells >= n_cells(1, n_seq) else 0

    def _fixed_bytes(self, n_seq: int) -> int:
        """Return the weights and one batch's logits and activations, in f32."""
        return self.weight_bytes + 4 * max(N_BATCH, n_seq) * (self.n_vocab + 2 * self.n_embd)

    def _bytes_per_cell(self, kv_type: str, n_seq: int) -> int:
        """Return a token's keys and values, and its column in the attention mask (f16), which a window has twice."""
        n_masks = 2 if self.sliding_window else 1
        return self.kv_bytes_per_token(kv_type) + 2 * max(N_BATCH, n_seq) * n_masks


def n_cells(n_ctx: int, n_seq: int) -> int:
    """Return the tokens of KV cache that n_seq sequences share when any one may grow to n_ctx."""
    return max(n_ctx, ROOM_PER_SEQUENCE * n_seq if n_seq > 1 else 0)


def fit_context(
    model: Path | Footprint,
    kv_type: str = "f16",
    *,
    n_seq: int = 1,
    wanted: int | None = None,
    available: int | None = None,
) -> int:
    """Return the context to run a file with, in tokens: `wanted`, or the model's own, at most 8,192 and what fits.

    Raises:
        ArtifactError: see `read_gguf`.
        ModelError: code "not-enough-memory"; the hint tells what would fit.
        UsageError: see `Footprint.kv_bytes_per_token`.
    """
    footprint = model if isinstance(model, Footprint) else Footprint.of(model)
    available = room_bytes() if available is None else available
    longest = footprint.max_ctx(available, kv_type, n_seq)
    default = min(footprint.n_ctx_train or MAX_DEFAULT_CTX, MAX_DEFAULT_CTX)
    # The model's context need not be a multiple of llama.cpp's cells, but the rounded number has to fit.
    if -(-(wanted or default) // _CELLS) * _CELLS <= longest:
        return wanted or default
    if wanted is None and longest:
        return longest
    n_ctx = wanted or _CELLS
    raise ModelError(
        f"not enough memory: {footprint.path.name} with {n_ctx} tokens of {kv_type} context takes "
        f"{format_bytes(footprint.total_bytes(n_ctx, kv_type, n_seq))}, and there is room for "
        f"{format_bytes(_usable(available))}",
        _what_fits(footprint, n_ctx, kv_type=kv_type, n_seq=n_seq, available=available),
        code="not-enough-memory",
    )


def flash_attention(footprint: Footprint, n_ctx: int, *, kv_type: str, available: int | None = None) -> bool | None:
    """Return whether one sequence should use flash attention; None leaves it to llama.cpp.

    On the processor llama.cpp's flash attention takes one cached token of one head at a time, so that it decodes slower
    than plain attention, the more so the longer the context is. But it saves memory, and a quantized cache needs it.
    Many sequences in one cache are always faster with it, since it skips the cells of the others.
    """
    if kv_type != "f16" or gpus():
        return None
    room = _usable(room_bytes() if available is None else available)
    return False if footprint.total_bytes(n_ctx) + footprint.score_bytes(n_ctx) <= room else None


def _what_fits(footprint: Footprint, n_ctx: int, *, kv_type: str, n_seq: int, available: int) -> str:
    """Return a hint: a shorter context, a smaller KV type, fewer sequences, or the largest file that would fit."""
    ways = []
    if longest := footprint.max_ctx(available, kv_type, n_seq):
        trained = footprint.n_ctx_train or longest
        ways.append(f"--context {longest}" if longest <= trained else f"--context {trained}, the model's own")
    names = footprint.kv_types()
    for smaller in names[names.index(kv_type) + 1 :]:
        if footprint.max_ctx(available, smaller, n_seq) >= n_ctx:
            ways.append(f"--kv-type {smaller} with this context")
            break
    if not ways and n_seq > 1 and footprint.max_ctx(available, kv_type):
        ways.append("fewer sequences at once")
    if ways:
        return f"what would fit: {', or '.join(ways)}"
    room = _usable(available) - footprint.total_bytes(_CELLS, kv_type) + footprint.weight_bytes
    if room <= 0:
        return "close other programs"
    return f"a file of at most {format_bytes(room)} would fit: quantized to a smaller type, or a smaller model"


def _usable(available: int) -> int:
    return int(available * (1 - _SPARE))


def room_bytes() -> int:
    """Return the bytes of memory for a model: the system's and that of graphics cards with memory of their own.

    llama.cpp puts as many layers as fit onto a card, the rest beside the processor.
    """
    return available_bytes() + sum(gpu.free_bytes for gpu in gpus() if not gpu.shares_memory)


def available_bytes() -> int:
    """Return the bytes that can be allocated without swapping, at most what a container's limit leaves."""
    return min([_system_bytes(), *_cgroup_rooms()])


def _system_bytes() -> int:
    if found := re.search(r"^MemAvailable: +(\d+) kB$", _text(hardware.ROOT / "proc" / "meminfo"), re.M):
        return int(found[1]) * 1024
    import psutil  # type: ignore[import-untyped]  # macOS, Windows; loading it takes longer than reading a file

    return int(psutil.virtual_memory().available)


def _cgroup_rooms() -> Iterator[int]:
    """Yield what each control group with a limit leaves this process, its page cache counted as free (v1 and v2)."""
    try:
        lines = (hardware.ROOT / "proc" / "self" / "cgroup").read_text().splitlines()
    except OSError:  # macOS, Windows
        return
    mount = hardware.ROOT / "sys" / "fs" / "cgroup"
    for line in lines:
        number, controllers, place = line.split(":", 2)
        if number == "0" and not controllers:
            root, limit, used, prefix = mount, "memory.max", "memory.current", ""
        elif "memory" in controllers.split(","):
            root, limit, used, prefix = mount / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"
        else:
            continue
        folder = root / place.strip("/")
        for group in (folder, *folder.parents):
            # In a container the path may be the host's, while the container's own group is at the root.
            if group.is_relative_to(root) and (top := _text(group / limit)).isdigit():
                stat = dict(line.split()[:2] for line in _text(group / "memory.stat").splitlines())
                cache = sum(_number(stat.get(f"{prefix}{kind}_file")) for kind in ("active", "inactive"))
                yield max(0, int(top) - _number(_text(group / used)) + cache)


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _number(value: Any) -> int:
    """Return a value as a number; 0 if it is missing or not a number."""
    try:
        return int(value)
    except (TypeError, ValueError):
        return 0


def _most(value: Any) -> int:
    """Return a number, or the largest of a list with one for each layer."""
    return max(map(_number, value), default=0) if isinstance(value, list) else _number(value)


def _kv_rows(about: dict[str, Any]) -> Iterator[tuple[int, int]]:
    """Yield (heads, head width) of each row a token adds, from an architecture's metadata without its prefix."""
    n_layer = _number(about.get("block_count")) - _number(about.get("nextn_predict_layers"))
    n_layer -= _number(about.get("attention.shared_kv_layers"))  # these read another layer's cache
    n_head = about.get("attention.head_count", 0)
    n_kv = about.get("attention.head_count_kv", n_head)  # a list where layers differ, 0 where one is recurrent
    width = _number(about.get("embedding_length")) // max(_most(n_head), 1)
    key = _number(about.get("attention.key_length")) or width
    value = _number(about.get("attention.value_length")) or width
    is_latent = "attention.key_length_mla" in about
    for layer in range(n_layer):
        n = _number(n_kv[layer] if isinstance(n_kv, list) and layer < len(n_kv) else n_kv)
        if n:
            yield n, key
        if n and not is_latent:
            yield n, value


def _read_bytes(tensors: dict[str, int], about: dict[str, Any]) -> int:
    """Return the bytes of weights that one token reads, without the embedding's other rows and unused experts."""
    n_experts, n_used = _number(about.get("expert_count")), _number(about.get("expert_used_count"))
    share = n_used / n_experts if n_experts else 1.0
    tied = "output.weight" not in tensors  # then the embedding is the output matrix too
    return sum(
        int(n_bytes * share) if "_exps." in name else n_bytes
        for name, n_bytes in tensors.items()
        if tied or name != "token_embd.weight"
    )
