"""Write a GGUF from a checkpoint folder, tensor by tensor: read rows, quantize them, append the bytes.

The size of every tensor is known before the first one is read, so the header is written at once and no intermediate F16
file is needed; memory holds one part of one tensor.
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
from ...localrun.core.reporter import SILENT, Reporter
from ...localrun.gguf import ggml
from ...localrun.machine.hardware import default_threads
from .architectures import PART_SIZE, Architecture, Planned, read_architecture
from .checkpoint import Checkpoint
from .files import replacing_parts, shard_paths, shards
from .ftypes import FTYPES, assign
from .licence import Provenance, read_provenance, write_provenance
from .tokenizer import Tokenizer, read_tokenizer, write_tokenizer

Types = Mapping[str, GGMLQuantizationType]
"""Tensor name -> its type."""
Importance = Mapping[str, npt.NDArray[np.float32]]
"""Tensor name -> a weight for each column: `[n_per_row]`, of stacked experts `[n_experts, n_per_row]`."""
Value = str | int | float | bool


@dataclass(frozen=True)
class TypedTensor:
    """A tensor of the file: the type that the mixture asks for, the type that it gets, and its columns' weights."""

    tensor: Planned
    asked: GGMLQuantizationType
    got: GGMLQuantizationType
    importance: npt.NDArray[np.float32] | None = None

    @property
    def n_weights(self) -> int:
        """The number of its weights."""
        return math.prod(self.tensor.shape)

    @property
    def n_bytes(self) -> int:
        """Its bytes in the file, without padding."""
        return ggml.row_size(self.got, self.n_weights)


@dataclass(frozen=True)
class Conversion:
    """Everything that a file will hold, before a weight is read."""

    ftype: str
    architecture: Architecture
    tokenizer: Tokenizer
    provenance: Provenance
    tensors: tuple[TypedTensor, ...]


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
        ftype: the type mixture, one of `ftypes.FTYPES`.
        base: an adapter's base model; the one that the adapter names if not given.
        types: the types of single tensors, in place of the mixture's.
        importance: an importance matrix; tensors that it does not have are quantized without one.

    Raises:
        ArtifactError: a file is missing or broken.
        ModelError: `code` "not-convertible", or "imatrix-mismatch": the importance matrix is another model's.
        UsageError: `code` "no-such-tensor", "type-does-not-fit" or "needs-imatrix".
    """
    checkpoint = Checkpoint(folder, base)
    architecture = read_architecture(checkpoint)
    importance, types = importance or {}, types or {}
    planned = architecture.tensors()
    if unknown := sorted(set(types) - {t.name for t in planned}):
        raise UsageError(f"the file of {folder} has no tensor {unknown[0]} to give a type to", code="no-such-tensor")
    shapes = {t.name: t.shape for t in planned}
    mixture = assign(ftype, shapes, model=architecture.shape, has_imatrix=bool(importance))
    chosen = mixture | {name: (type_, type_) for name, type_ in types.items()}
    tensors = tuple(_checked(TypedTensor(t, *chosen[t.name], importance.get(t.name))) for t in planned)
    tokenizer = read_tokenizer(checkpoint, architecture.n_vocab)
    return Conversion(ftype, architecture, tokenizer, read_provenance(checkpoint), tensors)


def _checked(typed: TypedTensor) -> TypedTensor:
    """Return a tensor if it can have its type and its columns' weights."""
    name, shape, weights = typed.tensor.name, typed.tensor.shape, typed.importance
    if shape[-1] % ggml.block_size(typed.got):
        raise UsageError(
            f"{name} cannot be {typed.got.name}: its rows of {shape[-1]} are not whole blocks", code="type-does-not-fit"
        )
    expected = importance_shape(shape)
    if weights is not None and weights.shape != expected:
        raise ModelError(
            f"the importance matrix has {list(weights.shape)} weights for {name}, which takes {list(expected)}",
            "it was made with another model",
            code="imatrix-mismatch",
        )
    if weights is None and typed.got in ggml.NEED_IMATRIX:
        raise UsageError(
            f"{name} cannot be {typed.got.name} without an importance matrix",
            "deepdistill quantize makes one from the traces",
            code="needs-imatrix",
        )
    return typed


def importance_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of an importance matrix's weights for a tensor: one a column, of stacked experts each."""
    return shape[:1] + shape[-1:] if len(shape) == 3 else shape[-1:]


def write(
    conversion: Conversion,
    out: Path,
    *,
    metadata: Mapping[str, Value] | None = None,
    report: Reporter = SILENT,
    n_threads: int | None = None,
    split_bytes: int | None = None,
    part_size: int = PART_SIZE,
) -> list[Path]:
    """Write the file, or its parts of at most `split_bytes` of tensors each, and return their paths.

    Files that are already there stay until all the new ones are complete.

    Args:
        conversion: what to write.
        out: the file.
        metadata: more keys for the file, such as `deepdistill.recipe`.
        report: is told the weights done after every part of a tensor.
        n_threads: the machine's cores if not given; the bytes do not depend on it.
        split_bytes: the most that the tensors of one file may take; one file if not given.
        part_size: how many numbers to read and quantize at a time; the bytes do not depend on it.

    Raises:
        ArtifactError: see `files.replacing_parts`; `code` "weights-broken": one is NaN, infinite, or too large for F16.
        UsageError: `code` "metadata-taken": a key that the file sets itself.
    """
    sizes = [t.n_bytes for t in conversion.tensors]
    spans = shards(sizes, split_bytes)
    paths = shard_paths(out, len(spans))
    n_done, n_weights = 0, sum(t.n_weights for t in conversion.tensors)
    with (
        replacing_parts(paths, sum(sizes)) as temporaries,
        ThreadPoolExecutor(n_threads or default_threads()) as pool,
    ):
        for i, (temporary, span) in enumerate(zip(temporaries, spans, strict=True)):
            writer = GGUFWriter(temporary, conversion.architecture.name)
            try:
                if i == 0:
                    write_metadata(conversion, writer, metadata or {})
                else:
                    writer.kv_data[0].clear()
                if len(spans) > 1:
                    writer.add_uint16(Keys.Split.LLM_KV_SPLIT_NO, i)
                    writer.add_uint16(Keys.Split.LLM_KV_SPLIT_COUNT, len(spans))
                    writer.add_int32(Keys.Split.LLM_KV_SPLIT_TENSORS_COUNT, len(sizes))
                tensors = conversion.tensors[span.start : span.stop]
                write_header(tensors, writer)
                for n, note in _write_tensors(tensors, writer, pool=pool, part_size=part_size):
                    n_done += n
                    report.progress("quantizing", n_done, total=n_weights, note=note)
            finally:
                writer.close()
    return paths


def write_header(tensors: Sequence[TypedTensor], writer: GGUFWriter) -> None:
    """Write everything that comes before the tensors' bytes: the metadata, and each tensor's name, shape and type."""
    for typed in tensors:
        name, shape = typed.tensor.name, typed.tensor.shape
        writer.add_tensor_info(name, shape, np.dtype(np.float32), typed.n_bytes, raw_dtype=typed.got)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


def write_metadata(conversion: Conversion, writer: GGUFWriter, metadata: Mapping[str, Value]) -> None:
    """Add a file's metadata: provenance, architecture, tokenizer, and whatever else is given.

    Raises:
        UsageError: `code` "metadata-taken": a key that the file sets itself.
    """
    writer.add_type(gguf.GGUFType.MODEL)
    write_provenance(conversion.provenance, writer)
    writer.add_size_label(_size_label(conversion))
    writer.add_file_type(int(FTYPES[conversion.ftype][0]))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    conversion.architecture.write_parameters(writer)
    write_tokenizer(conversion.tokenizer, writer)
    thinks = "<think>" in (conversion.tokenizer.chat_template or "")
    marks = {"deepdistill.think_open": "<think>", "deepdistill.think_close": "</think>"} if thinks else {}
    for key, value in (marks | dict(metadata)).items():
        if key in writer.kv_data[0]:
            raise UsageError(f"the file sets the metadata key {key} itself", code="metadata-taken")
        writer.add_key_value(key, value, GGUFValueType.get_type(value))


def _size_label(conversion: Conversion) -> str:
    """Return a size such as `135M`, or `8x1.5B` of a model with experts."""
    n_experts = conversion.architecture.n_experts
    in_experts = sum(t.n_weights for t in conversion.tensors if "_exps." in t.tensor.name)
    total = sum(t.n_weights for t in conversion.tensors)
    return gguf.size_label(total, total - in_experts, in_experts // max(1, n_experts), n_experts)


def _write_tensors(
    tensors: Sequence[TypedTensor], writer: GGUFWriter, *, pool: Executor, part_size: int
) -> Iterator[tuple[int, str]]:
    """Append every tensor's bytes, padded to the alignment that the header promised; yield weights done and a note."""
    assert writer.fout is not None
    file = writer.fout[0]
    writer.write_padding(file, file.tell())
    for typed in tensors:
        n_written = 0
        for rows, weights in weighted_rows(typed, typed.importance, part_size):
            n_written += file.write(encode(typed, rows, weights=weights, pool=pool))
            yield rows.size, f"{typed.tensor.name} {typed.got.name}"
        assert n_written == typed.n_bytes, typed.tensor.name
        writer.write_padding(file, n_written)


def weighted_rows(
    typed: TypedTensor, importance: npt.NDArray[np.float32] | None, part_size: int = PART_SIZE
) -> Iterator[tuple[npt.NDArray[np.float32], npt.NDArray[np.float32] | None]]:
    """Yield a tensor's rows `[n_rows, n_per_row]` in parts of one matrix each, with the weights of their columns.

    `importance` is `[n_per_row]`, of stacked experts `[n_experts, n_per_row]`.
    """
    n_rows, done = math.prod(typed.tensor.shape[-2:-1]), 0
    for rows in typed.tensor.read(part_size):
        if importance is None or importance.ndim == 1:
            yield rows, importance
            continue
        start = 0
        while start < len(rows):  # a part may end in the middle of an expert, or hold several
            expert, within = divmod(done + start, n_rows)
            stop = min(len(rows), start + n_rows - within)
            yield rows[start:stop], importance[expert]
            start = stop
        done += len(rows)


def encode(
    typed: TypedTensor,
    rows: npt.NDArray[np.float32],
    *,
    weights: npt.NDArray[np.float32] | None,
    pool: Executor | None = None,
) -> memoryview:
    """Return the bytes of a tensor's rows `[n_rows, n_per_row]` under its type, given their columns' weights.

    Raises:
        ArtifactError: `code` "weights-broken": a value is NaN, infinite, or too large for F16.
    """
    try:
        if typed.got == GGMLQuantizationType.F32:
            if not np.isfinite(rows).all():
                raise ValueError("NaN or infinite values")
            return np.ascontiguousarray(rows, "<f4").data
        # ggml would write infinity without a word.
        if typed.got == GGMLQuantizationType.F16 and np.abs(rows).max(initial=0) > np.finfo(np.float16).max:
            raise ValueError("values too large for F16; BF16 and F32 can hold them")
        return ggml.quantize_rows(rows, typed.got, imatrix=weights, pool=pool).data
    except ValueError as error:
        hint = "training diverged, or the checkpoint is broken"
        raise ArtifactError(f"{typed.tensor.name}: {error}", hint, code="weights-broken") from error


def round_trip(
    rows: npt.NDArray[np.float32],
    type_: GGMLQuantizationType,
    *,
    weights: npt.NDArray[np.float32] | None,
    pool: Executor | None = None,
) -> npt.NDArray[np.float32]:
    """Return rows `[n_rows, n_per_row]` as they are after a type has stored them, given their columns' weights."""
    data = ggml.quantize_rows(rows, type_, imatrix=weights, pool=pool)
    return ggml.dequantize_rows(data, type_, rows.shape[1])
