"""Make a file again from the sources that it names, and compare the bytes of every tensor and the sources' hashes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import ArtifactError, UsageError
from ..localrun.core.reporter import SILENT, Reporter
from ..localrun.core.text import listed
from ..localrun.gguf.header import StoredTensor
from .choose.imatrix import read_imatrix
from .convert.writer import Conversion, Importance, TypedTensor, encode, plan, weighted_rows
from .provenance.inspect import own_metadata, stored_tensors
from .provenance.metadata import source_of

Stored = Mapping[str, tuple[Path, StoredTensor]]
"""Tensor name -> the part of the file that it is in, and its place there."""


@dataclass(frozen=True)
class Verified:
    """The result: how many tensors were compared, the ones that differ, and how the sources differ."""

    n_tensors: int
    different: tuple[str, ...]
    sources: tuple[str, ...]

    @property
    def holds(self) -> bool:
        """Whether the file is what it says it is."""
        return not self.different and not self.sources

    def summary(self) -> list[str]:
        """Return lines for people."""
        lines = [f"differs: {text}" for text in self.sources]
        n_equal = self.n_tensors - len(self.different)
        lines.append(f"{n_equal} of {self.n_tensors} tensors are the same, byte for byte")
        if self.different:
            lines.append(f"different: {listed(self.different, most=8)}")
        return lines


def verify(
    path: Path,
    student_dir: Path | None = None,
    *,
    imatrix_path: Path | None = None,
    base: Path | None = None,
    report: Reporter = SILENT,
) -> Verified:
    """Quantize a file's source again with the types of the file, and compare every tensor.

    Args:
        path: the file, made by deepdistill.
        student_dir: its source; the file says where it was if not given.
        imatrix_path: its importance matrix; the file says where it is if not given.
        base: an adapter's base; the file says where it was if not given.
        report: is told after every tensor.

    Raises:
        ArtifactError: `code` "source-missing", or a file is missing or broken.
        UsageError: `code` "source-unknown": the file does not say what it was made from.
    """
    metadata, stored = own_metadata(path), stored_tensors(path)
    source = metadata.get("source")
    if not isinstance(source, dict):
        hint = "only files that deepdistill quantize wrote can be verified"
        raise UsageError(f"{path} does not say what it was made from", hint, code="source-unknown")
    folder = student_dir or path.parent / source["folder"]
    if not folder.is_dir():
        hint = "give its folder: deepdistill quantize FOLDER --verify FILE"
        raise ArtifactError(f"the source of {path} is not at {folder}", hint, code="source-missing")
    if base is None and source.get("base"):
        base = path.parent / source["base"]
    sources = list(_source_differences(source["sha256"], folder, base))
    conversion = plan(folder, "F16", base=base)
    importance: Importance = {}
    if recorded := metadata.get("imatrix"):
        imatrix_path = imatrix_path or path.parent / recorded["file"]
        imatrix = read_imatrix(imatrix_path)
        if imatrix.hash() != recorded["sha256"]:
            sources.append(f"{imatrix_path} is not the importance matrix that the file was made with")
        importance = imatrix.importance({one.tensor.name: one.tensor.shape for one in conversion.tensors})
    names = {one.tensor.name for one in conversion.tensors}
    different = [*(names ^ stored.keys()), *_different(conversion, stored, importance=importance, report=report)]
    return Verified(len(names | stored.keys()), tuple(sorted(different)), tuple(sources))


def _different(conversion: Conversion, stored: Stored, *, importance: Importance, report: Reporter) -> Iterator[str]:
    """Yield the names of tensors that are stored with other bytes than their source makes."""
    for i, typed in enumerate(conversion.tensors):
        name = typed.tensor.name
        if name in stored:
            path, tensor = stored[name]
            if not _is_same(replace(typed, got=tensor.type, importance=importance.get(name)), path, tensor):
                yield name
        report.progress("verifying", i + 1, total=len(conversion.tensors), note=name)


def _is_same(typed: TypedTensor, path: Path, tensor: StoredTensor) -> bool:
    """Say whether a tensor of a file has the bytes, and no others, that its source makes."""
    n_left = tensor.n_bytes
    with path.open("rb") as file:
        file.seek(tensor.offset)
        for rows, weights in weighted_rows(typed, typed.importance):
            made = encode(typed, rows, weights=weights).tobytes()
            n_left -= len(made)
            if file.read(len(made)) != made:
                return False
    return n_left == 0


def _source_differences(expected: dict[str, str], folder: Path, base: Path | None) -> Iterator[str]:
    found = source_of(folder, base)["sha256"]
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            yield f"{folder / name} is missing"
        elif name in expected and expected[name] != found[name]:
            yield f"{folder / name} has changed"
