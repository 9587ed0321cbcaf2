"""Our header reader against gguf's."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest

from deepdistill.errors import ArtifactError
from deepdistill.quantize.quantize import quantize
from deepdistill.quantize.readback import read_gguf


def test_it_reads_what_ggufs_reader_does(student: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    quantize(student, path, "Q4_K_M", metadata={"deepdistill.note": "Grüße"})
    ours, theirs = read_gguf(path), gguf.GGUFReader(path)
    for tensor in theirs.tensors:
        found = ours.tensors[tensor.name]
        assert found.shape == tuple(int(n) for n in tensor.shape[::-1])
        assert (found.type, found.offset, found.n_bytes) == (tensor.tensor_type, tensor.data_offset, tensor.n_bytes)
    assert len(ours.tensors) == len(theirs.tensors)
    fields = {name: field for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert ours.metadata == {name: field.contents() for name, field in fields.items()}


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.99])
def test_a_file_cut_anywhere_is_told(student: Path, tmp_path: Path, share: float) -> None:
    path = tmp_path / "model.gguf"
    quantize(student, path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ArtifactError, match=r"no whole GGUF file|cut short"):
        read_gguf(path)


@pytest.mark.parametrize("junk", [b"", b"GGUF", b"GGUF" + b"\xff" * 400, b"<html>" * 99])
def test_junk_is_told(tmp_path: Path, junk: bytes) -> None:
    (tmp_path / "junk.gguf").write_bytes(junk)
    with pytest.raises(ArtifactError, match="no whole GGUF file"):
        read_gguf(tmp_path / "junk.gguf")
