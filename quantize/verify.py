"""Make a file again from what it says it was made from, and compare: every tensor's bytes, and the sources' hashes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Type

from ..errors import ArtifactError, UsageError
from ..localrun.core.reporter import Progress, no_progress
from ..localrun.gguf import ggml
from ..localrun.gguf.header import StoredTensor
from .choose.imatrix import read_imatrix
from .choose.sensitivity import parts_of
from .convert.writer import Typed, plan
from .provenance.inspect import read_own, stored_tensors
from .provenance.metadata import source_of


@dataclass(frozen=True)
class Verified:
    """What came of it: tensors that are equal, of how many, those that differ, and what differs of the sources."""

    n_tensors: int
    different: tuple[str, ...]
    sources: tuple[str, ...]

    @property
    def holds(self) -> bool:
        """Whether the file is what it says."""
        return not self.different and not self.sources

    def summary(self) -> list[str]:
        """Return lines for people."""
        lines = [f"differs: {text}" for text in self.sources]
        n_equal = self.n_tensors - len(self.different)
        lines.append(f"{n_equal} of {self.n_tensors} tensors made again, byte for byte the same")
        if self.different:
            lines.append(f"not the same: {', '.join(self.different[:8])}{' …' if len(self.different) > 8 else ''}")
        return lines


def verify(
    path: Path,
    student_dir: Path | None = None,
    imatrix_path: Path | None = None,
    base: Path | None = None,
    on_progress: Progress = no_progress,
) -> Verified:
    """Quantize the source of a file again with the types that the file has, and compare every tensor.

    Args:
        path: the file, made by deepdistill.
        student_dir: its source; where the file says it was, if not given.
        imatrix_path: its importance matrix; where the file says it is, if not given.
        base: an adapter's base; where the file says it was, if not given.
        on_progress: called after every tensor.

    Raises:
        ArtifactError: the file, the source or the importance matrix is missing or broken.
        UsageError: the file does not say what it was made from.
    """
    own, stored = read_own(path), stored_tensors(path)
    if not isinstance(own.get("source"), dict):
        raise UsageError(f"{path} does not say what it was made from", "deepdistill quantize writes files that do")
    folder = student_dir or path.parent / own["source"]["folder"]
    if not folder.is_dir():
        raise ArtifactError(f"the source of {path} is not at {folder}", "give it: deepdistill quantize FOLDER --verify")
    if base is None and (recorded := own["source"].get("base")):
        base = path.parent / recorded
    sources = list(_source_differences(own["source"]["sha256"], folder, base))
    conversion = plan(folder, "F16", base=base)
    importance = {}
    if made_with := own.get("imatrix"):
        found = imatrix_path or path.parent / made_with["file"]
        imatrix = read_imatrix(found)
        if imatrix.hash() != made_with["sha256"]:
            sources.append(f"{found} is not the importance matrix that it was made with")
        shapes = {one.tensor.name: one.tensor.shape for one in conversion.tensors}
        importance = imatrix.importance(shapes)
    names = {one.tensor.name for one in conversion.tensors}
    different = list(names ^ stored.keys())
    for i, typed in enumerate(conversion.tensors):
        name = typed.tensor.name
        if name in stored:
            part, tensor = stored[name]
            if _digest(typed, tensor.type, importance.get(name)) != _stored_digest(part, tensor):
                different.append(name)
        on_progress("verifying", i + 1, len(conversion.tensors), name)
    return Verified(len(names | stored.keys()), tuple(sorted(different)), tuple(sources))


def _source_differences(expected: dict[str, str], folder: Path, base: Path | None) -> Iterator[str]:
    found = source_of(folder, base)["sha256"]
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            yield f"{folder / name} is missing"
        elif name in expected and expected[name] != found[name]:
            yield f"{folder / name} is another file than it was"


def _digest(typed: Typed, type_: Type, weights: npt.NDArray[np.float32] | None) -> str:
    digest = hashlib.sha256()
    for rows, columns in parts_of(typed, weights):
        if type_ == Type.F32:
            digest.update(np.ascontiguousarray(rows, "<f4").tobytes())
        else:
            digest.update(ggml.quantize_rows(rows, type_, imatrix=columns).tobytes())
    return digest.hexdigest()


def _stored_digest(path: Path, tensor: StoredTensor) -> str:
    with path.open("rb") as file:
        file.seek(tensor.offset)
        digest, left = hashlib.sha256(), tensor.n_bytes
        while left:
            block = file.read(min(left, 1 << 22))
            if not block:
                raise ArtifactError(f"{path} is cut short")
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()
