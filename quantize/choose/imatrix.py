"""The importance matrix: how much each column of a weight matters, as the mean square of its inputs.

Files are read and written in llama.cpp's format: a GGUF of type `imatrix` with `<weight>.in_sum2` and
`<weight>.counts` for each weight.

Source: https://github.com/ggml-org/llama.cpp, tools/imatrix/imatrix.cpp and tools/quantize/quantize.cpp.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFWriter

from ...errors import ArtifactError, ModelError
from ...localrun.core.atomic import replacing_file
from ...localrun.core.reporter import SILENT, Reporter
from ...localrun.gguf.header import StoredTensor, read_gguf
from ..convert.writer import importance_shape

_CHUNK_TOKENS = 512
_SUMS, _COUNTS = ".in_sum2", ".counts"


@dataclass(frozen=True)
class Imatrix:
    """The sums of squares of each weight `[n_counts, n]`, the number of rows summed `[n_counts]`, and their source."""

    sums: Mapping[str, npt.NDArray[np.float32]]
    counts: Mapping[str, npt.NDArray[np.float32]]
    datasets: tuple[str, ...] = ()

    def importance(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, npt.NDArray[np.float32]]:
        """Return the mean squares of each named weight: `[n_per_row]`, of stacked ones `[n_matrices, n_per_row]`.

        All columns of an expert that saw no token count alike, as in llama.cpp.

        Raises:
            ModelError: `code` "imatrix-mismatch".
        """
        found = {}
        for name in self.sums.keys() & shapes.keys():
            shape, sums, counts = shapes[name], self.sums[name], self.counts[name][:, None]
            mean = np.where(counts > 0, sums / np.maximum(counts, 1), 1).astype(np.float32)
            expected = importance_shape(shape)
            if mean.size != math.prod(expected):
                raise ModelError(
                    f"the importance matrix has {mean.size} columns for {name}, which takes {list(expected)}",
                    "it was made with another model",
                    code="imatrix-mismatch",
                )
            found[name] = mean.reshape(expected)
        return found

    @property
    def n_tokens(self) -> int:
        """The tokens that it was made from."""
        return int(max((counts.max() for counts in self.counts.values()), default=0))

    def hash(self) -> str:
        """Return the SHA-256 of its numbers, which does not depend on the file."""
        digest = hashlib.sha256()
        for name in sorted(self.sums):
            digest.update(name.encode() + b"\0" + self.sums[name].tobytes() + self.counts[name].tobytes())
        return digest.hexdigest()


def collect_imatrix(
    model_path: Path,
    texts: Sequence[Sequence[int]],
    *,
    dataset: str,
    n_threads: int | None = None,
    report: Reporter = SILENT,
) -> Imatrix:
    """Read texts of token ids with an unquantized GGUF, and return the squares of its weights' inputs.

    Raises:
        ArtifactError: see `activations.collect_squares`.
        ModelError: see there; `code` "weights-broken": the inputs are not finite.
    """
    from ...localrun.weights.activations import collect_squares

    def on_text(n: int) -> None:
        report.progress("importance", n, total=len(texts))

    squares = collect_squares(model_path, texts, n_threads=n_threads, on_text=on_text)
    sums = {name: one.sums.reshape(len(one.counts), -1).astype(np.float32) for name, one in squares.items()}
    broken = next((name for name, values in sums.items() if not np.isfinite(values).all()), None)
    if broken:
        hint = "training diverged, or the checkpoint is broken"
        raise ModelError(f"the activations before {broken} are not finite", hint, code="weights-broken")
    return Imatrix(sums, {name: one.counts.astype(np.float32) for name, one in squares.items()}, (dataset,))


def write_imatrix(imatrix: Imatrix, path: Path) -> None:
    """Write llama.cpp's format.

    Raises:
        ArtifactError: `code` "write-failed".
    """
    with replacing_file(path) as temporary:
        writer = GGUFWriter(temporary, "")
        writer.kv_data[0].clear()  # an imatrix has no architecture
        writer.add_string("general.type", "imatrix")
        writer.add_array("imatrix.datasets", list(imatrix.datasets) or [""])
        writer.add_uint32("imatrix.chunk_count", -(-imatrix.n_tokens // _CHUNK_TOKENS))
        writer.add_uint32("imatrix.chunk_size", _CHUNK_TOKENS)
        for name in sorted(imatrix.sums):
            writer.add_tensor(name + _SUMS, np.ascontiguousarray(imatrix.sums[name], np.float32))
            writer.add_tensor(name + _COUNTS, np.ascontiguousarray(imatrix.counts[name][:, None], np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def read_imatrix(path: Path) -> Imatrix:
    """Read llama.cpp's format.

    Raises:
        ArtifactError: `code` "no-imatrix", "not-an-imatrix" or "imatrix-broken".
    """
    if not path.is_file():
        hint = "leave out --imatrix to make one, or give --imatrix none"
        raise ArtifactError(f"no importance matrix at {path}", hint, code="no-imatrix")
    header = read_gguf(path)
    if header.metadata.get("general.type") != "imatrix":
        hint = "llama-imatrix writes one with --output-format gguf" if path.suffix == ".dat" else ""
        raise ArtifactError(f"{path} is not an importance matrix", hint, code="not-an-imatrix")
    values = {name: _read_values(path, name, tensor) for name, tensor in header.tensors.items()}
    names = [name.removesuffix(_SUMS) for name in values if name.endswith(_SUMS)]
    bad = next((n for n in names if n + _COUNTS not in values or len(values[n + _SUMS]) % len(values[n + _COUNTS])), "")
    if bad or not names:
        raise _broken(path, f"{bad or 'no weight'} has no counts")
    counts = {name: values[name + _COUNTS] for name in names}
    sums = {name: values[name + _SUMS].reshape(len(counts[name]), -1) for name in names}
    return Imatrix(sums, counts, tuple(map(str, header.metadata.get("imatrix.datasets", ()))))


def _read_values(path: Path, name: str, tensor: StoredTensor) -> npt.NDArray[np.float32]:
    if tensor.type != GGMLQuantizationType.F32:
        raise _broken(path, f"{name} is {tensor.type.name}, not F32")
    values = np.fromfile(path, "<f4", tensor.n_bytes // 4, offset=tensor.offset)
    if not np.isfinite(values).all() or (values < 0).any():
        raise _broken(path, f"{name} has negative or infinite sums of squares")
    return values


def _broken(path: Path, reason: str) -> ArtifactError:
    return ArtifactError(f"{path} is broken: {reason}", "make it again", code="imatrix-broken")
