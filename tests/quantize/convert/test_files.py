"""Shards: their names, what goes into each, and that llama.cpp loads them as it loads one file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from deepdistill.errors import UsageError
from deepdistill.localrun.core.reporter import Reporter
from deepdistill.localrun.core.text import parse_size
from deepdistill.localrun.engine.engine import Engine
from deepdistill.localrun.gguf.header import read_gguf
from deepdistill.quantize.convert.files import replacing_parts, shards
from deepdistill.quantize.convert.writer import plan, write


def test_llama_cpp_loads_the_parts_as_the_whole(student: Path, tmp_path: Path) -> None:
    seen: list[float] = []

    class Shares(Reporter):
        def progress(self, stage: str, done: float, *, total: float, note: str = "") -> None:
            seen.append(done / total)

    (whole,) = write(plan(student, "Q8_0"), tmp_path / "whole.gguf", n_threads=1)
    parts = write(
        plan(student, "Q8_0"),
        tmp_path / "m.gguf",
        metadata={"deepdistill.a": "b"},
        report=Shares(),
        n_threads=2,
        split_bytes=40_000,
    )
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


def test_files_appear_together_or_not_at_all(tmp_path: Path) -> None:
    paths = [tmp_path / "new" / "a", tmp_path / "new" / "b"]

    def write_one_and_stop() -> None:
        with replacing_parts(paths, 10) as temporaries:
            temporaries[0].write_text("whole")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_one_and_stop()
    assert list((tmp_path / "new").iterdir()) == []
    with replacing_parts(paths, 10) as temporaries:
        for temporary in temporaries:
            temporary.write_text("whole")
        assert not any(path.exists() for path in paths)
    assert [path.read_text() for path in paths] == ["whole", "whole"]
    assert len(list((tmp_path / "new").iterdir())) == 2


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
        with pytest.raises(UsageError, check=lambda error: error.code == "bad-size"):
            parse_size(text)
