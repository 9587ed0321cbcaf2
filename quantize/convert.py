"""Write a GGUF from a checkpoint folder, tensor by tensor: read rows, quantize them, append the bytes.

The size of every tensor is known before the first is read, so the header is written at once and no intermediate f16
file is needed; memory holds one part of one tensor. The file grows beside its place and is renamed when it is whole.
"""

from __future__ import annotations

import errno
import math
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFWriter

from ..errors import ArtifactError, UsageError
from ..localrun import ggml
from ..localrun.progress import Progress
from .architecture import Architecture, Planned
from .card import Provenance, read_provenance, write_provenance
from .checkpoint import Checkpoint
from .ftypes import FTYPES, choose
from .tokenizer import Tokenizer, read_tokenizer, write_tokenizer


@dataclass(frozen=True)
class Typed:
    """A tensor of the file, with the type that the recipe asks for and the one that it gets."""

    tensor: Planned
    asked: GGMLQuantizationType
    got: GGMLQuantizationType

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


def plan(folder: Path, ftype: str) -> Conversion:
    """Read a checkpoint's config, tokenizer and tensor index, and choose the type of every tensor.

    Raises:
        ArtifactError: a file is missing or broken.
        ModelError: something that this converter would get wrong.
    """
    checkpoint = Checkpoint(folder)
    architecture = Architecture(checkpoint)
    shape = architecture.shape
    tensors = [Typed(t, *choose(ftype, t.name, t.shape, shape)) for t in architecture.tensors()]
    tokenizer = read_tokenizer(checkpoint, architecture.n_vocab)
    return Conversion(ftype, architecture, tokenizer, read_provenance(checkpoint), tuple(tensors))


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
        for rows in typed.tensor.read():
            try:
                data = _encode(rows, typed.got, pool)
            except ValueError as error:
                hint = "the checkpoint's training diverged, or the file is broken"
                raise ArtifactError(f"{typed.tensor.name}: {error}", hint) from error
            n_written += file.write(data)
            done += rows.size
            on_progress("quantizing", done, total, f"{typed.tensor.name} {typed.got.name}")
        assert n_written == typed.n_bytes, typed.tensor.name
        writer.write_padding(file, n_written)


def _encode(rows: npt.NDArray[np.float32], type_: GGMLQuantizationType, pool: Executor) -> bytes:
    if type_ == GGMLQuantizationType.F32:
        if not np.isfinite(rows).all():
            raise ValueError("NaN or infinite values")
        return rows.astype("<f4", copy=False).tobytes()
    if type_ == GGMLQuantizationType.F16 and np.abs(rows).max(initial=0) > np.finfo(np.float16).max:
        raise ValueError("values too large for F16: BF16 and F32 hold them")
    return ggml.quantize_rows(rows, type_, pool=pool).tobytes()


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
