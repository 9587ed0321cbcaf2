"""Shards: their names, what goes into each, and that llama.cpp loads them as it loads one file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deepdistill.errors import ArtifactError, UsageError
from deepdistill.localrun.core.reporter import no_progress
from deepdistill.localrun.engine.engine import Engine
from deepdistill.localrun.gguf.header import read_gguf
from deepdistill.quantize.convert.files import parse_size, shards
from deepdistill.quantize.convert.writer import plan, write


def test_llama_cpp_loads_the_parts_as_the_whole(student: Path, tmp_path: Path) -> None:
    seen: list[float] = []

    def on_progress(_stage: str, done: float, total: float, _note: str = "") -> None:
        seen.append(done / total)

    (whole,) = write(plan(student, "Q8_0"), tmp_path / "whole.gguf", {}, no_progress, 1)
    parts = write(plan(student, "Q8_0"), tmp_path / "m.gguf", {"deepdistill.a": "b"}, on_progress, 2, 40_000)
    assert [part.name for part in parts] == [f"m-{i + 1:05d}-of-00004.gguf" for i in range(4)]
    assert {path.name for path in tmp_path.iterdir()} == {part.name for part in parts} | {"whole.gguf"}
    assert seen == sorted(seen)
    assert seen[-1] == 1.0
    headers = [read_gguf(part) for part in parts]
    assert [list(header.metadata) for header in headers[1:]] == [["split.no", "split.count", "split.tensors.count"]] * 3
    assert [header.metadata["split.no"] for header in headers] == [0, 1, 2, 3]
    assert headers[0].metadata["deepdistill.a"] == "b"
    assert headers[0].metadata["split.tensors.count"] == sum(len(header.tensors) for header in headers) == 21
    assert all(sum(t.n_bytes for t in header.tensors.values()) <= 40_000 for header in headers)
    with Engine(whole, n_threads=1) as one, Engine(parts[0], n_threads=1) as many:
        assert np.array_equal(one.logits([5, 9, 12]), many.logits([5, 9, 12]))


def test_a_part_that_cannot_be_written_leaves_none(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deepdistill.quantize.convert import writer as convert

    real = convert._write_shard

    def full(tensors: Any, writer: Any, meter: Any, pool: Any) -> None:
        if len(list(tmp_path.glob(".*.part"))) > 2:
            raise OSError(28, "No space left on device")
        real(tensors, writer, meter, pool)

    monkeypatch.setattr(convert, "_write_shard", full)
    with pytest.raises(ArtifactError, match="the disk is full"):
        write(plan(student, "Q8_0"), tmp_path / "m.gguf", {}, no_progress, 1, 40_000)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("sizes", "limit", "expected"),
    [
        ([1, 2, 3], None, [[0, 1, 2]]),
        ([1, 2, 3], 6, [[0, 1, 2]]),
        ([1, 2, 3], 5, [[0, 1], [2]]),
        ([9, 1, 9], 5, [[0], [1], [2]]),
        ([], 5, [[]]),
    ],
)
def test_tensors_fill_parts_in_order(sizes: list[int], limit: int | None, expected: list[list[int]]) -> None:
    assert [list(span) for span in shards(sizes, limit)] == expected


def test_sizes_are_counted_as_disks_are() -> None:
    assert [parse_size(text) for text in ("90MB", "2g", "1.5M", "4096")] == [90_000_000, 2 * 10**9, 1_500_000, 4096]
    for text in ("", "MB", "-3M", "0", "nanG", "1e999"):
        with pytest.raises(UsageError, match="is no size"):
            parse_size(text)
