"""The importance matrix: how much each column of a weight matters, as the mean square of what it is multiplied with.

Files have llama.cpp's format, in both directions: a GGUF of type `imatrix` with `<weight>.in_sum2` and
`<weight>.counts` for each weight.

Source: https://github.com/ggml-org/llama.cpp, tools/imatrix/imatrix.cpp and tools/quantize/quantize.cpp.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFWriter

from ...errors import ArtifactError, ModelError
from ...localrun.gguf.header import read_gguf

_CHUNK_TOKENS = 512
_SUMS, _COUNTS = ".in_sum2", ".counts"


@dataclass(frozen=True)
class Imatrix:
    """Sums of squares by weight `[n_counts, n]` and the rows that were summed `[n_counts]`; where it came from."""

    sums: Mapping[str, npt.NDArray[np.float32]]
    counts: Mapping[str, npt.NDArray[np.float32]]
    datasets: tuple[str, ...] = ()

    def importance(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, npt.NDArray[np.float32]]:
        """Return the mean squares of each named weight: `[n_per_row]`, of stacked ones `[n_matrices, n_per_row]`.

        An expert that saw nothing counts all its columns alike, as in llama.cpp.

        Raises:
            ModelError: it was made with another model.
        """
        found = {}
        for name in self.sums.keys() & shapes.keys():
            shape, sums, counts = shapes[name], self.sums[name], self.counts[name][:, None]
            mean = np.where(counts > 0, sums / np.maximum(counts, 1), 1).astype(np.float32)
            wanted = shape[:1] + shape[-1:] if len(shape) == 3 else shape[-1:]
            if mean.size != int(np.prod(wanted)):
                raise ModelError(
                    f"the importance matrix has {mean.size} columns for {name}, which takes {list(wanted)}",
                    "it was made with another model",
                )
            found[name] = mean.reshape(wanted)
        return found

    @property
    def n_tokens(self) -> int:
        """How many tokens it saw."""
        return int(max((counts.max() for counts in self.counts.values()), default=0))

    def hash(self) -> str:
        """Return the SHA-256 of its numbers, whatever the file that holds them looks like."""
        digest = hashlib.sha256()
        for name in sorted(self.sums):
            digest.update(name.encode() + b"\0" + self.sums[name].tobytes() + self.counts[name].tobytes())
        return digest.hexdigest()


def collect_imatrix(
    model_path: Path,
    texts: Iterable[Sequence[int]],
    dataset: str,
    *,
    n_threads: int | None = None,
    on_text: Callable[[int], None] = lambda _: None,
) -> Imatrix:
    """Read texts of token ids with an unquantized GGUF and return what its weights were multiplied with.

    Raises:
        ArtifactError, ModelError: see `activations.collect_squares`.
    """
    from ...localrun.weights.activations import collect_squares

    squares = collect_squares(model_path, texts, n_threads=n_threads, on_text=on_text)
    sums = {name: one.sums.reshape(len(one.counts), -1).astype(np.float32) for name, one in squares.items()}
    broken = next((name for name, values in sums.items() if not np.isfinite(values).all()), None)
    if broken:
        raise ModelError(f"the activations before {broken} are not finite", "the checkpoint's training diverged")
    return Imatrix(sums, {name: one.counts.astype(np.float32) for name, one in squares.items()}, (dataset,))


def write_imatrix(imatrix: Imatrix, path: Path) -> None:
    """Write llama.cpp's format, beside its place and renamed.

    Raises:
        ArtifactError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
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
        os.replace(temporary, path)
    except OSError as error:
        raise ArtifactError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def read_imatrix(path: Path) -> Imatrix:
    """Read llama.cpp's format.

    Raises:
        ArtifactError: it is missing, broken, or no importance matrix.
    """
    if not path.is_file():
        raise ArtifactError(
            f"no importance matrix at {path}", "leave --imatrix out to make one, or give --imatrix none"
        )
    header = read_gguf(path)
    if header.metadata.get("general.type") != "imatrix":
        hint = "llama-imatrix writes one with --output-format gguf" if path.suffix == ".dat" else ""
        raise ArtifactError(f"{path} is no importance matrix", hint)
    values = {}
    for name, tensor in header.tensors.items():
        if tensor.type != GGMLQuantizationType.F32:
            raise ArtifactError(f"{path} is broken: {name} is {tensor.type.name}, not F32")
        read = np.fromfile(path, "<f4", tensor.n_bytes // 4, offset=tensor.offset)
        if not np.isfinite(read).all() or (read < 0).any():
            raise ArtifactError(f"{path} is broken: {name} holds numbers that no sum of squares can be")
        values[name] = read
    names = [name.removesuffix(_SUMS) for name in values if name.endswith(_SUMS)]
    bad = next((n for n in names if n + _COUNTS not in values or len(values[n + _SUMS]) % len(values[n + _COUNTS])), "")
    if bad or not names:
        raise ArtifactError(f"{path} is broken: {bad or 'no weight'} has no counts")
    counts = {name: values[name + _COUNTS] for name in names}
    sums = {name: values[name + _SUMS].reshape(len(counts[name]), -1) for name in names}
    return Imatrix(sums, counts, tuple(map(str, header.metadata.get("imatrix.datasets", ()))))
