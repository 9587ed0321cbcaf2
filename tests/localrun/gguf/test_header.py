"""Our header reader against gguf's."""

from __future__ import annotations

import itertools
import struct
import tracemalloc
from pathlib import Path

import gguf
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deepdistill.errors import ArtifactError
from deepdistill.localrun.gguf.header import read_gguf


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
    with pytest.raises(ArtifactError, check=lambda error: error.code in ("gguf-broken", "gguf-cut-short")):
        read_gguf(path)


@pytest.mark.parametrize("junk", [b"", b"GGUF", b"GGUF" + b"\xff" * 400, b"<html>" * 99])
def test_junk_is_told(tmp_path: Path, junk: bytes) -> None:
    (tmp_path / "junk.gguf").write_bytes(junk)
    with pytest.raises(ArtifactError, check=lambda error: error.code == "gguf-broken"):
        read_gguf(tmp_path / "junk.gguf")


def entry(name: str, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", kind) + value


def array(kind: int, n: int, body: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, n) + body


def row(name: str = "a", dims: tuple[int, ...] = (4, 2), type_: int = 0, offset: int = 0) -> bytes:
    head = struct.pack("<Q", len(name)) + name.encode() + struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
    return head + struct.pack("<IQ", type_, offset)


def gguf_of(entries: list[bytes], rows: list[bytes], data: bytes = bytes(64), version: int = 3, **counts: int) -> bytes:
    n_rows, n_entries = counts.get("n_rows", len(rows)), counts.get("n_entries", len(entries))
    head = b"GGUF" + struct.pack("<IQQ", version, n_rows, n_entries) + b"".join(entries) + b"".join(rows)
    return head + bytes(-len(head) % 32) + data


DEEP = array(9, 1) * 50_000 + array(0, 0)
HUGE = 1 << 62


@pytest.mark.parametrize(
    ("file", "says"),
    [
        (gguf_of([], [row()], n_rows=HUGE), "announces"),
        (gguf_of([], [row()], n_entries=HUGE), "announces"),
        (gguf_of([entry("a", 8, struct.pack("<Q", HUGE))], []), "announces"),
        (gguf_of([struct.pack("<Q", HUGE) + b"a"], []), "announces"),
        (gguf_of([entry("", 0, b"\1")], []), "a name of 0"),
        (gguf_of([entry("a" * 70_000, 0, b"\1")], []), "a name of 70,000"),
        (gguf_of([entry("a", 0, b"\1"), entry("a", 0, b"\1")], []), "appears twice"),
        (gguf_of([entry("a", 13, b"\1")], []), "type 13"),
        (gguf_of([entry("a", 9, array(4, HUGE))], []), "announces"),
        (gguf_of([entry("a", 9, array(8, 1000, bytes(80)))], []), "announces"),
        (gguf_of([entry("a", 9, array(77, 1))], []), "array of type 77"),
        (gguf_of([entry("a", 9, DEEP)], []), "4 deep"),
        (gguf_of([entry(name, 9, array(0, 5 << 20, bytes(5 << 20))) for name in "ab"], []), "too long"),
        (gguf_of([entry("a", 8, struct.pack("<Q", 1) + b"\xff")], []), "utf-8"),
        (gguf_of([entry("general.alignment", 4, struct.pack("<I", 0))], []), "alignment of 0"),
        (gguf_of([entry("general.alignment", 4, struct.pack("<I", 48))], []), "alignment of 48"),
        (gguf_of([entry("general.alignment", 4, struct.pack("<I", 1 << 31))], []), "alignment of 2147483648"),
        (gguf_of([entry("general.alignment", 8, struct.pack("<Q", 1) + b"8")], []), "alignment of '8'"),
        (gguf_of([entry("general.alignment", 7, b"\1")], []), "alignment of True"),
        (gguf_of([], [row(dims=())]), "0 dimensions"),
        (gguf_of([], [row(dims=(1,) * 5)]), "5 dimensions"),
        (gguf_of([], [row(dims=(4, 0))]), "[0, 4] in F32"),
        (gguf_of([], [row(dims=(33, 2), type_=8)]), "[2, 33] in Q8_0"),
        (gguf_of([], [row(dims=(1 << 32, 1 << 32))]), "cut short"),
        (gguf_of([], [row(offset=8)]), "not aligned"),
        (gguf_of([], [row(offset=64)]), "cut short"),
        (gguf_of([], [row(offset=HUGE)]), "cut short"),
        (gguf_of([], [row(), row()]), "appears twice"),
        (gguf_of([], [row(), row("b")]), "overlap"),
        (gguf_of([], [row(type_=4000)]), "unknown type, 4000"),
        (gguf_of([], [], version=1), "version 1"),
        (gguf_of([], [], version=3 << 24), "version"),
    ],
)  # fmt: skip
def test_what_a_file_cannot_hold_is_refused(tmp_path: Path, file: bytes, says: str) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(file)
    tracemalloc.start()
    try:
        with pytest.raises(ArtifactError, check=lambda e: e.code.startswith(("gguf-", "type-")) and says in e.message):
            read_gguf(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 100_000_000


def test_a_sound_file_of_every_kind_of_value_is_read(tmp_path: Path) -> None:
    """The builder above makes sound files, so that what is refused is refused for the reason named."""
    entries = [
        entry("general.alignment", 4, struct.pack("<I", 64)),
        entry("flag", 7, b"\1"),
        entry("deep", 9, array(9, 2, array(2, 1, b"\7\0") + array(8, 1, struct.pack("<Q", 1) + b"x"))),
    ]
    head = gguf_of(entries, [row(), row("b", (32,), 8, 64)], data=b"")
    (tmp_path / "a.gguf").write_bytes(head + bytes(-len(head) % 64) + bytes(64 + 34))
    header = read_gguf(tmp_path / "a.gguf")
    assert header.metadata == {"general.alignment": 64, "flag": True, "deep": [[7], ["x"]]}
    first, second = header.tensors["a"], header.tensors["b"]
    assert (first.shape, second.shape, second.n_bytes) == ((2, 4), (32,), 34)
    assert second.offset - first.offset == 64


@given(st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=9)), min_size=1, max_size=4))
@settings(max_examples=300, deadline=None, database=None, suppress_health_check=list(HealthCheck))
def test_a_changed_file_is_read_or_refused(
    random_gguf: Path, tmp_path: Path, changes: list[tuple[float, bytes]]
) -> None:
    data = bytearray(random_gguf.read_bytes())
    n_header = min(tensor.offset for tensor in read_gguf(random_gguf).tensors.values())
    for at, junk in changes:
        start = int(at * n_header)
        data[start : start + len(junk)] = junk
    path = tmp_path / "changed.gguf"
    path.write_bytes(data)
    try:
        header = read_gguf(path)
    except ArtifactError:
        return
    spans = sorted((t.offset, t.offset + t.n_bytes) for t in header.tensors.values())
    assert all(0 < start < end <= len(data) for start, end in spans)
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))
