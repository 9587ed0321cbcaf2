"""Write a GGUF from a checkpoint folder, tensor by tensor: read rows, quantize them, append the bytes.

The size of every tensor is known before the first is read, so the header is written at once and no intermediate f16
file is needed; memory holds one part of one tensor. The file grows beside its place and is renamed when it is whole.
"""

from __future__ import annotations

import errno
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFWriter

from ..errors import ArtifactError, ModelError, UsageError
from ..localrun import ggml
from ..localrun.progress import Progress
from .architecture import Architecture, Planned
from .card import Provenance, read_provenance, write_provenance
from .checkpoint import Checkpoint
from .ftypes import FTYPES, Shape, choose
from .tokenizer import Tokenizer, read_tokenizer, write_tokenizer

Types = Mapping[str, GGMLQuantizationType]
"""Tensor name -> the type that it shall have."""
Importance = Mapping[str, npt.NDArray[np.float32]]
"""Tensor name -> a weight for each column `[n_per_row]`, for stacked experts `[n_experts, n_per_row]`."""


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


def plan(folder: Path, ftype: str, *, types: Types | None = None, importance: Importance | None = None) -> Conversion:
    """Read a checkpoint's config, tokenizer and tensor index, and choose the type of every tensor.

    Args:
        folder: the checkpoint.
        ftype: the recipe, one of `ftypes.FTYPES`.
        types: what single tensors get instead of the recipe's type.
        importance: an importance matrix; tensors that it leaves out are quantized without.

    Raises:
        ArtifactError: a file is missing or broken.
        ModelError: something that this converter would get wrong, or an importance matrix of another model.
        UsageError: a type that its tensor cannot have, or for a tensor that is not there.
    """
    checkpoint = Checkpoint(folder)
    architecture = Architecture(checkpoint)
    importance, types = importance or {}, types or {}
    planned = architecture.tensors()
    if unknown := sorted(set(types) - {t.name for t in planned}):
        raise UsageError(f"{folder} becomes no tensor {unknown[0]}", "a type can be given only to its own tensors")
    tensors = [_typed(ftype, t, architecture.shape, types.get(t.name), importance) for t in planned]
    tokenizer = read_tokenizer(checkpoint, architecture.n_vocab)
    return Conversion(ftype, architecture, tokenizer, read_provenance(checkpoint), tuple(tensors))


def _typed(
    ftype: str, tensor: Planned, model: Shape, given: GGMLQuantizationType | None, importance: Importance
) -> Typed:
    name, shape = tensor.name, tensor.shape
    weights = importance.get(name)
    asked, got = (given, given) if given is not None else choose(ftype, name, shape, model)
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


def write(conversion: Conversion, out: Path, metadata: dict[str, str], on_progress: Progress, n_threads: int) -> None:
    """Write the file; what stood at `out` before stays until the new file is whole.

    Raises:
        ArtifactError: the disk is full, the folder cannot be written, or a weight is NaN or infinite.
    """
    n_bytes = sum(t.n_bytes for t in conversion.tensors)
    with _beside(out, n_bytes) as temporary, ThreadPoolExecutor(n_threads) as pool:
        writer = GGUFWriter(temporary, conversion.architecture.name)
        try:
            _write_metadata(conversion, writer, metadata)
            for typed in conversion.tensors:
                shape = typed.tensor.shape
                writer.add_tensor_info(typed.tensor.name, shape, np.dtype(np.float32), typed.n_bytes, typed.got)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            _write_tensors(conversion, writer, on_progress, pool)
        finally:
            writer.close()


def _write_metadata(conversion: Conversion, writer: GGUFWriter, metadata: dict[str, str]) -> None:
    writer.add_type(gguf.GGUFType.MODEL)
    write_provenance(conversion.provenance, writer)
    n_weights = sum(t.n_weights for t in conversion.tensors)
    writer.add_size_label(gguf.size_label(n_weights, 0, 0, 0))
    writer.add_file_type(int(FTYPES[conversion.ftype][0]))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    conversion.architecture.write_parameters(writer)
    write_tokenizer(conversion.tokenizer, writer)
    thinks = "<think>" in (conversion.tokenizer.chat_template or "")
    own = {"deepdistill.think_open": "<think>", "deepdistill.think_close": "</think>"} if thinks else {}
    for key, value in (own | metadata).items():
        if key in writer.kv_data[0]:
            raise UsageError(f"the metadata {key} is the file's own")
        writer.add_string(key, value)


def _write_tensors(conversion: Conversion, writer: GGUFWriter, on_progress: Progress, pool: Executor) -> None:
    """Append every tensor's bytes, padded to the alignment that the header promised."""
    assert writer.fout is not None
    file = writer.fout[0]
    writer.write_padding(file, file.tell())
    done, total = 0, sum(t.n_weights for t in conversion.tensors)
    for typed in conversion.tensors:
        n_written = 0
        for rows, weights in _parts(typed):
            try:
                data = _encode(rows, typed.got, pool, weights)
            except ValueError as error:
                hint = "the checkpoint's training diverged, or the file is broken"
                raise ArtifactError(f"{typed.tensor.name}: {error}", hint) from error
            n_written += file.write(data)
            done += rows.size
            on_progress("quantizing", done, total, f"{typed.tensor.name} {typed.got.name}")
        assert n_written == typed.n_bytes, typed.tensor.name
        writer.write_padding(file, n_written)


def _parts(typed: Typed) -> Iterator[tuple[npt.NDArray[np.float32], npt.NDArray[np.float32] | None]]:
    """Yield a tensor's rows, in parts that belong to one expert, with the weights of their columns."""
    weights, n_rows = typed.importance, math.prod(typed.tensor.shape[-2:-1])
    done = 0
    for rows in typed.tensor.read():
        if weights is None or weights.ndim == 1:
            yield rows, weights
            continue
        for start in range(0, len(rows), n_rows):
            yield rows[start : start + n_rows], weights[(done + start) // n_rows]
        done += len(rows)


def _encode(
    rows: npt.NDArray[np.float32],
    type_: GGMLQuantizationType,
    pool: Executor,
    weights: npt.NDArray[np.float32] | None = None,
) -> bytes:
    if type_ == GGMLQuantizationType.F32:
        if not np.isfinite(rows).all():
            raise ValueError("NaN or infinite values")
        return rows.astype("<f4", copy=False).tobytes()
    if type_ == GGMLQuantizationType.F16 and np.abs(rows).max(initial=0) > np.finfo(np.float16).max:
        raise ValueError("values too large for F16: BF16 and F32 hold them")
    return ggml.quantize_rows(rows, type_, weights, pool).tobytes()


@contextmanager
def _beside(out: Path, n_bytes: int) -> Iterator[Path]:
    """Give a temporary path beside `out` that replaces it at the end, or vanishes.

    Raises:
        ArtifactError: the disk is full or the folder cannot be written.
    """
    if out.is_dir():
        raise ArtifactError(f"{out} is a folder", "name the file, such as student.gguf")
    temporary = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(out.parent).free
        if free < n_bytes:
            raise OSError(errno.ENOSPC, f"{n_bytes / 1e6:.0f} MB needed, {free / 1e6:.0f} MB free")
        temporary = out.with_name(f".{out.name}.{os.getpid()}.part")
        yield temporary
        _settle(temporary, out)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            detail = f" ({error.strerror})" if "MB" in (error.strerror or "") else ""
            hint = "free some space, or give --out on another disk; what was there before is untouched"
            raise ArtifactError(f"the disk is full: {out} cannot be written{detail}", hint) from error
        raise ArtifactError(f"cannot write {out}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _settle(temporary: Path, out: Path) -> None:
    """Put a finished file in its place, on disk before its name is."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, out)
