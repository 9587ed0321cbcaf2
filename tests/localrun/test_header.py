"""Our header reader against gguf's."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest

from deepdistill.errors import ArtifactError
from deepdistill.localrun.header import read_gguf


@pytest.mark.parametrize("model", ["random_gguf", "smollm2_gguf"])  # F32 alone; Q4_1 and Q6_K
def test_it_reads_what_ggufs_reader_does(model: str, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(model)
    ours, theirs = read_gguf(path), gguf.GGUFReader(path)
    for tensor in theirs.tensors:
        found = ours.tensors[tensor.name]
        assert found.shape == tuple(int(n) for n in tensor.shape[::-1])
        assert (found.type, found.offset, found.n_bytes) == (tensor.tensor_type, tensor.data_offset, tensor.n_bytes)
    assert len(ours.tensors) == len(theirs.tensors)
    fields = {name: field for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert ours.metadata == {name: field.contents() for name, field in fields.items()}


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.99])
def test_a_file_cut_anywhere_is_told(random_gguf: Path, tmp_path: Path, share: float) -> None:
    path = tmp_path / "model.gguf"
    data = random_gguf.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ArtifactError, match=r"no whole GGUF file|cut short"):
        read_gguf(path)


@pytest.mark.parametrize("junk", [b"", b"GGUF", b"GGUF" + b"\xff" * 400, b"<html>" * 99])
def test_junk_is_told(tmp_path: Path, junk: bytes) -> None:
    (tmp_path / "junk.gguf").write_bytes(junk)
    with pytest.raises(ArtifactError, match="no whole GGUF file"):
        read_gguf(tmp_path / "junk.gguf")
