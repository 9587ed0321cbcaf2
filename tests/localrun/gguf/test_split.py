"""Shards: what llama.cpp makes of them, and the gguf package's reader as the judge of every byte."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from deepdistill.errors import ArtifactError
from deepdistill.localrun.engine.engine import Engine
from deepdistill.localrun.gguf.split import is_shard, split_gguf

MAX = 40_000  # the tiny model's largest tensors are larger


def contents(path: Path) -> tuple[dict[str, object], dict[str, tuple[bytes, list[int], int]]]:
    """Return a file's metadata and tensors as the gguf package reads them."""
    reader = gguf.GGUFReader(path)
    metadata = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    tensors = {t.name: (t.data.tobytes(), [int(n) for n in t.shape], int(t.tensor_type)) for t in reader.tensors}
    return metadata, tensors


def test_every_byte_is_kept_and_every_shard_says_its_place(random_gguf: Path, tmp_path: Path) -> None:
    metadata, tensors = contents(random_gguf)
    shards = split_gguf(random_gguf, tmp_path, MAX)
    assert len(shards) > 3
    assert [path.name for path in shards] == [
        f"random-{i + 1:05d}-of-{len(shards):05d}.gguf" for i in range(len(shards))
    ]
    assert all(map(is_shard, shards))
    assert not is_shard(random_gguf)
    found: dict[str, tuple[bytes, list[int], int]] = {}
    for number, path in enumerate(shards):
        own, parts = contents(path)
        place = {"split.no": number, "split.count": len(shards), "split.tensors.count": len(tensors)}
        assert own == (metadata if number == 0 else {}) | place
        assert len(parts) == 1 or sum(len(data) for data, _, _ in parts.values()) <= MAX
        found |= parts
    assert found == tensors
    assert list(found) == list(tensors)


def test_llama_cpp_finds_all_shards_from_the_first(random_gguf: Path, tmp_path: Path) -> None:
    first = split_gguf(random_gguf, tmp_path, MAX)[0]
    with Engine(random_gguf, n_threads=1) as whole, Engine(first, n_threads=1) as parts:
        tokens = whole.tokenize("<|im_start|>user\nthe answer<|im_end|>\n")
        assert parts.tokenize("<|im_start|>user\nthe answer<|im_end|>\n") == tokens
        assert np.array_equal(whole.logits(tokens), parts.logits(tokens))


def test_a_small_model_is_one_shard(random_gguf: Path, tmp_path: Path) -> None:
    (only,) = split_gguf(random_gguf, tmp_path)
    assert only.name == "random-00001-of-00001.gguf"
    with Engine(only, n_threads=1) as engine:
        assert engine.n_vocab > 0


def test_another_alignment_holds_in_every_shard(tmp_path: Path) -> None:
    path = tmp_path / "wide.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(128)
    for i in range(3):
        writer.add_tensor(f"t{i}", np.full((3, 5), i, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    shards = split_gguf(path, tmp_path, 60)
    assert len(shards) == 3
    for i, shard in enumerate(shards):
        (tensor,) = gguf.GGUFReader(shard).tensors
        assert tensor.data_offset % 128 == 0
        assert tensor.data.tolist() == np.full((3, 5), i).tolist()


def test_a_shard_is_not_split_again(random_gguf: Path, tmp_path: Path) -> None:
    second = split_gguf(random_gguf, tmp_path, MAX)[1]
    with pytest.raises(ArtifactError, check=lambda error: error.code == "is-shard"):
        split_gguf(second, tmp_path)


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.gguf").write_bytes(b"GGUF" + (3).to_bytes(4, "little") + bytes(16))
    with pytest.raises(ArtifactError, check=lambda error: error.code == "no-tensors"):
        split_gguf(tmp_path / "empty.gguf", tmp_path)
