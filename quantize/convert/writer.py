"""Write a GGUF from a checkpoint folder, tensor by tensor: read rows, quantize them, append the bytes.

The size of every tensor is known before the first is read, so the header is written at once and no intermediate f16
file is needed; memory holds one part of one tensor. The file grows beside its place and is renamed when it is whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter, Keys

from ...errors import ArtifactError, ModelError, UsageError
from ...localrun.core.reporter import Progress
from ...localrun.gguf import ggml
from .architectures import Architecture, Planned, read_architecture
from .checkpoint import Checkpoint
from .files import beside, shard_paths, shards
from .ftypes import FTYPES, assign
from .licence import Provenance, read_provenance, write_provenance
from .tokenizer import Tokenizer, read_tokenizer, write_tokenizer

Types = Mapping[str, GGMLQuantizationType]
"""Tensor name -> the type that it shall have."""
Importance = Mapping[str, npt.NDArray[np.float32]]
"""Tensor name -> a weight for each column `[n_per_row]`, for stacked experts `[n_experts, n_per_row]`."""
Value = str | int | float | bool
Part = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32] | None]


@dataclass(frozen=True)
class Typed:
    """A tensor of the file, with the type that the recipe asks for, the one that it gets, and its columns' weights."""

    tensor: Planned
    asked: GGMLQuantizationType
    got: GGMLQuantizationType
    importance: npt.NDArray[np.float32] | None = None

    @property
    def n_weights(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.tensor.shape)

    @property
    def n_bytes(self) -> int:
        """How many bytes it takes in the file, without padding."""
        return self.n_weights // ggml.block_size(self.got) * ggml.type_size(self.got)


@dataclass(frozen=True)
class Conversion:
    """Everything that a file will hold, before a weight is read."""

    ftype: str
    architecture: Architecture
    tokenizer: Tokenizer
    provenance: Provenance
    tensors: tuple[Typed, ...]


def plan(
    folder: Path,
    ftype: str,
    *,
    base: Path | None = None,
    types: Types | None = None,
    importance: Importance | None = None,
) -> Conversion:
    """Read a checkpoint's config, tokenizer and tensor index, and choose the type of every tensor.

    Args:
        folder: the checkpoint, or a LoRA adapter.
        ftype: the recipe, one of `ftypes.FTYPES`.
        base: an adapter's base model; what the adapter names if not given.
        types: what single tensors get instead of the recipe's type.
        importance: an importance matrix; tensors that it leaves out are quantized without.

    Raises:
        ArtifactError: a file is missing or broken.
        ModelError: something that this converter would get wrong, or an importance matrix of another model.
        UsageError: a type that its tensor cannot have, or for a tensor that is not there.
    """
    checkpoint = Checkpoint(folder, base)
    architecture = read_architecture(checkpoint)
    importance, types = importance or {}, types or {}
    planned = architecture.tensors()
    if unknown := sorted(set(types) - {t.name for t in planned}):
        raise UsageError(f"{folder} becomes no tensor {unknown[0]}", "a type can be given only to its own tensors")
    shapes = {t.name: t.shape for t in planned}
    recipe = assign(ftype, shapes, architecture.shape, has_imatrix=bool(importance))
    chosen = recipe | {name: (type_, type_) for name, type_ in types.items()}
    tensors = tuple(_typed(t, *chosen[t.name], importance.get(t.name)) for t in planned)
    tokenizer = read_tokenizer(checkpoint, architecture.n_vocab)
    return Conversion(ftype, architecture, tokenizer, read_provenance(checkpoint), tensors)


def _typed(
    tensor: Planned, asked: GGMLQuantizationType, got: GGMLQuantizationType, weights: npt.NDArray[np.float32] | None
) -> Typed:
    name, shape = tensor.name, tensor.shape
    if shape[-1] % ggml.block_size(got):
        raise UsageError(f"{name} cannot be {got.name}: rows of {shape[-1]} are no multiple of its block")
    wanted = shape[:1] + shape[-1:] if len(shape) == 3 else shape[-1:]
    if weights is not None and weights.shape != wanted:
        found = list(weights.shape)
        raise ModelError(
            f"the importance matrix has {found} weights for {name}, which takes {list(wanted)}",
            "it was made with another model",
        )
    if weights is None and got in ggml.NEED_IMATRIX:
        raise UsageError(f"{name} cannot be {got.name} without an importance matrix", "deepdistill quantize makes one")
    return Typed(tensor, asked, got, weights)


def write(
    conversion: Conversion,
    out: Path,
    metadata: Mapping[str, Value],
    on_progress: Progress,
    n_threads: int,
    split_bytes: int | None = None,
) -> list[Path]:
    """Write the file, or its parts of at most split_bytes of tensors each, and return where they are.

    What stood there before stays until the new files are whole.

    Raises:
        ArtifactError: the disk is full, the folder cannot be written, or a weight is NaN or infinite.
        UsageError: metadata that is the file's own.
    """
    sizes = [t.n_bytes for t in conversion.tensors]
    spans = shards(sizes, split_bytes)
    places = shard_paths(out, len(spans))
    meter = _Meter(on_progress, sum(t.n_weights for t in conversion.tensors))
    with beside(places, sum(sizes)) as temporaries, ThreadPoolExecutor(n_threads) as pool:
        for i, (temporary, span) in enumerate(zip(temporaries, spans, strict=True)):
            writer = GGUFWriter(temporary, conversion.architecture.name)
            try:
                if i == 0:
                    _write_metadata(conversion, writer, metadata)
                else:
                    writer.kv_data[0].clear()
                if len(spans) > 1:
                    writer.add_uint16(Keys.Split.LLM_KV_SPLIT_NO, i)
                    writer.add_uint16(Keys.Split.LLM_KV_SPLIT_COUNT, len(spans))
                    writer.add_int32(Keys.Split.LLM_KV_SPLIT_TENSORS_COUNT, len(sizes))
                _write_shard(conversion.tensors[span.start : span.stop], writer, meter, pool)
            finally:
                writer.close()
    return places


def _write_shard(tensors: Sequence[Typed], writer: GGUFWriter, meter: _Meter, pool: Executor) -> None:
    for typed in tensors:
        writer.add_tensor_info(
            typed.tensor.name, typed.tensor.shape, np.dtype(np.float32), typed.n_bytes, raw_dtype=typed.got
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    _write_tensors(tensors, writer, meter, pool)


def _write_metadata(conversion: Conversion, writer: GGUFWriter, metadata: Mapping[str, Value]) -> None:
    writer.add_type(gguf.GGUFType.MODEL)
    write_provenance(conversion.provenance, writer)
    writer.add_size_label(_size_label(conversion))
    writer.add_file_type(int(FTYPES[conversion.ftype][0]))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    conversion.architecture.write_parameters(writer)
    write_tokenizer(conversion.tokenizer, writer)
    thinks = "<think>" in (conversion.tokenizer.chat_template or "")
    own = {"deepdistill.think_open": "<think>", "deepdistill.think_close": "</think>"} if thinks else {}
    for key, value in (own | dict(metadata)).items():
        if key in writer.kv_data[0]:
            raise UsageError(f"the metadata {key} is the file's own")
        writer.add_key_value(key, value, GGUFValueType.get_type(value))


def _size_label(conversion: Conversion) -> str:
    """Return a size such as `135M`, or `8x1.5B` of a model with experts."""
    n_experts = conversion.architecture.n_experts
    in_experts = sum(t.n_weights for t in conversion.tensors if "_exps." in t.tensor.name)
    total = sum(t.n_weights for t in conversion.tensors)
    return gguf.size_label(total, total - in_experts, in_experts // max(1, n_experts), n_experts)


class _Meter:
    """How much is written, of all the parts."""

    def __init__(self, on_progress: Progress, total: int) -> None:
        self._on_progress, self._total, self._done = on_progress, total, 0

    def add(self, n: int, note: str) -> None:
        self._done += n
        self._on_progress("quantizing", self._done, self._total, note)


def _write_tensors(tensors: Sequence[Typed], writer: GGUFWriter, meter: _Meter, pool: Executor) -> None:
    """Append every tensor's bytes, padded to the alignment that the header promised."""
    assert writer.fout is not None
    file = writer.fout[0]
    writer.write_padding(file, file.tell())
    for typed in tensors:
        n_written = 0
        for rows, weights in _parts(typed):
            try:
                n_written += file.write(_encode(rows, typed.got, pool, weights))
            except ValueError as error:
                hint = "the checkpoint's training diverged, or the file is broken"
                raise ArtifactError(f"{typed.tensor.name}: {error}", hint) from error
            meter.add(rows.size, f"{typed.tensor.name} {typed.got.name}")
        assert n_written == typed.n_bytes, typed.tensor.name
        writer.write_padding(file, n_written)


def _parts(typed: Typed) -> Iterator[Part]:
    """Yield a tensor's rows, in parts that belong to one expert, with the weights of their columns."""
    weights, n_rows = typed.importance, math.prod(typed.tensor.shape[-2:-1])
    done = 0
    for rows in typed.tensor.read():
        if weights is None or weights.ndim == 1:
            yield rows, weights
            continue
        start = 0
        while start < len(rows):
            expert, within = divmod(done + start, n_rows)
            stop = min(len(rows), start + n_rows - within)
            yield rows[start:stop], weights[expert]
            start = stop
        done += len(rows)


def _encode(
    rows: npt.NDArray[np.float32],
    type_: GGMLQuantizationType,
    pool: Executor,
    weights: npt.NDArray[np.float32] | None = None,
) -> memoryview:
    if type_ == GGMLQuantizationType.F32:
        if not np.isfinite(rows).all():
            raise ValueError("NaN or infinite values")
        return np.ascontiguousarray(rows, "<f4").data
    if type_ == GGMLQuantizationType.F16 and np.abs(rows).max(initial=0) > np.finfo(np.float16).max:
        raise ValueError("values too large for F16: BF16 and F32 hold them")
    return ggml.quantize_rows(rows, type_, imatrix=weights, pool=pool).data
