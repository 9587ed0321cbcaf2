"""The sidecar of log-probabilities: what is read back was written, to sixteen bits, and nothing torn is ever read."""

from __future__ import annotations

import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepdistill.distill.records import Grade, Problem, TeacherInfo, Trace
from deepdistill.distill.traces.logprobs import Logprobs, encode, logprobs_path
from deepdistill.distill.traces.store import TraceStore
from deepdistill.errors import ArtifactError
from deepdistill.localrun.core.generation import Completion, Sampling, TopLogprobs


def make(index: int) -> Trace:
    problem = Problem(f"p{index}", f"question {index}?", "42", "test", "math")
    done = Completion("42", "40+2", True, "stop", 10, 5, 3, 0.5)
    return Trace.make(
        problem,
        done,
        grade=Grade("42", "right", "grader", 1.0),
        info=TeacherInfo("t", "gguf"),
        teacher="t",
        sampling=Sampling(),
    )


def is_broken_at_its_start(error: ArtifactError) -> bool:
    return error.code == "logprobs-broken" and "at byte 0" in error.message


def logits_to_top(rng: np.random.Generator, n_tokens: int, k: int, n_vocab: int, spread: float) -> TopLogprobs:
    logits = rng.normal(0, spread, (n_tokens, n_vocab))
    logprobs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    ids = np.argsort(-logprobs, axis=1)[:, :k].astype(np.int32)
    return TopLogprobs(ids, np.take_along_axis(logprobs, ids, axis=1).astype(np.float32))


def completion(top: TopLogprobs) -> Completion:
    n_tokens = len(top.ids)
    return Completion("42", "40+2", True, "stop", 9, n_tokens, 3, 0.5, token_ids=tuple(range(n_tokens)), logprobs=top)


def write(path: Path, index: int, top: TopLogprobs) -> str:
    with TraceStore(path) as store:
        store.append(make(index), completion(top))
    return make(index).id


@given(
    n_tokens=st.integers(0, 40),
    k=st.integers(1, 70),
    spread=st.floats(0.0, 30.0),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=60, deadline=None)
def test_round_trip_within_float16_and_the_tail_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, n_tokens: int, k: int, spread: float, seed: int
) -> None:
    top = logits_to_top(np.random.default_rng(seed), n_tokens, k, 100, spread)
    path = tmp_path_factory.mktemp("s") / "traces.jsonl"
    name = write(path, 0, top)
    with Logprobs(logprobs_path(path)) as stored:
        found = stored.get(name)
    assert found is not None
    ids, back = found
    assert ids.tolist() == list(range(n_tokens))
    np.testing.assert_array_equal(back.ids, top.ids)
    assert (back.ids.dtype, back.values.dtype, back.values.shape) == (np.int32, np.float32, (n_tokens, k))
    # Rounding to 11 bits, and the shift that gives the tail back, which is no larger than the largest rounding.
    np.testing.assert_allclose(back.values, top.values, rtol=2**-10, atol=2**-11 * 5)
    tail = 1 - np.exp(top.values.astype(np.float64)).sum(axis=1)
    tail_back = 1 - np.exp(back.values.astype(np.float64)).sum(axis=1)
    np.testing.assert_allclose(tail_back, tail, rtol=0.01, atol=1e-6)


@pytest.mark.parametrize("tail", [0.0, 1e-6, 5e-5, 0.02, 0.5, 0.999])
def test_the_tail_is_kept_where_rounding_alone_would_lose_it(tmp_path: Path, tail: float) -> None:
    probabilities = np.array([[0.61803, 0.2, 0.18197]]) * (1 - tail)
    values = np.log(probabilities).astype(np.float32)
    name = write(tmp_path / "t.jsonl", 0, TopLogprobs(np.array([[1, 2, 3]], np.int32), values))
    with Logprobs(logprobs_path(tmp_path / "t.jsonl")) as stored:
        _, back = stored.get(name) or (None, None)
    assert back is not None
    left = 1 - np.exp(back.values.astype(np.float64)).sum()
    assert left == pytest.approx(tail, rel=0.02, abs=2e-7)
    rounded = 1 - np.exp(values.astype(np.float16).astype(np.float64)).sum()
    if tail == 5e-5:
        assert abs(rounded - tail) > 0.2 * tail, "the case is one where it matters"


def test_a_token_takes_at_most_330_bytes_and_the_layout_is_the_one_in_the_docs() -> None:
    top = logits_to_top(np.random.default_rng(1), 100, 64, 1000, 3.0)
    record = encode("00112233445566778899aabbccddeeff", range(100), top)
    assert len(record) / 100 <= 330
    magic, version, k, n_tokens, key, crc, head_crc = struct.unpack_from("<4sHHI16sII", record)
    assert (magic, version, k, n_tokens, key.hex()) == (b"DDLP", 1, 64, 100, "00112233445566778899aabbccddeeff")
    assert crc == zlib.crc32(record[36:])
    assert head_crc == zlib.crc32(record[:32])
    assert [int.from_bytes(record[36 + 3 * i : 39 + 3 * i], "little") for i in range(100)] == list(range(100))
    first = 36 + 300
    assert int.from_bytes(record[first : first + 3], "little") == top.ids[0, 0]
    assert struct.unpack_from("<e", record, first + 3 * 6400)[0] == pytest.approx(
        np.log(1 - np.exp(top.values[0]).sum()), rel=1e-2
    )


def test_missing_entries_and_impossible_ids(tmp_path: Path) -> None:
    path = tmp_path / "traces.jsonl"
    top = TopLogprobs(np.array([[5, -1]], np.int32), np.array([[-0.5, -np.inf]], np.float32))
    with TraceStore(path) as store:
        store.append(make(0), replace(completion(top)))
    with Logprobs(logprobs_path(path)) as stored:
        _, back = stored.get(make(0).id) or (None, None)
        assert back is not None
        assert back.ids.tolist() == [[5, -1]]
        assert back.values[0, 1] == -np.inf
        assert stored.get(make(1).id) is None
        assert make(0).id in stored
        assert len(stored) == 1
    with pytest.raises(ValueError, match="24 bits"):
        encode("x", [1 << 24], TopLogprobs(np.zeros((1, 1), np.int32), np.zeros((1, 1), np.float32)))
    with pytest.raises(ValueError, match="2 tokens"):
        encode("x", [1, 2], TopLogprobs(np.zeros((1, 1), np.int32), np.zeros((1, 1), np.float32)))


def test_the_stored_trace_says_how_many_there_are(tmp_path: Path) -> None:
    path = tmp_path / "traces.jsonl"
    top = logits_to_top(np.random.default_rng(0), 4, 3, 50, 2.0)
    with TraceStore(path) as store:
        store.append(make(0), completion(top))
        store.append(replace(make(1), n_logprobs=9), replace(completion(top), logprobs=None))
        store.append(make(0), completion(top))
    assert [trace.n_logprobs for trace in TraceStore.read(path)] == [3, 0]
    assert logprobs_path(path).stat().st_size == 36 + 4 * (5 + 5 * 3)


def test_a_record_torn_at_any_byte_is_cut_off_on_opening(tmp_path: Path) -> None:
    path = tmp_path / "traces.jsonl"
    top = logits_to_top(np.random.default_rng(0), 3, 2, 50, 2.0)
    name = write(path, 0, top)
    side = logprobs_path(path)
    whole = side.read_bytes()
    torn = encode(make(1).id, range(3), top)
    for cut in range(1, len(torn) + 1):  # the last one is a whole record whose trace was never written
        side.write_bytes(whole + torn[:cut])
        with Logprobs(side) as stored:
            assert stored.get(name) is not None
        with TraceStore(path) as store:
            assert store.repairs == [f"traces.logprobs.bin: cut off {cut} bytes that belong to no trace"]
        assert side.read_bytes() == whole
    with TraceStore(path) as store:
        assert store.repairs == []
        store.append(make(1), completion(top))
    with Logprobs(side) as stored:
        assert len(stored) == 2


def test_a_broken_byte_is_never_read_as_a_number(tmp_path: Path) -> None:
    path = tmp_path / "traces.jsonl"
    top = logits_to_top(np.random.default_rng(0), 3, 2, 50, 2.0)
    names = [write(path, index, top) for index in range(2)]
    side = logprobs_path(path)
    whole = side.read_bytes()
    for at in range(len(whole) // 2):
        side.write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
        with pytest.raises(ArtifactError, check=is_broken_at_its_start), Logprobs(side) as stored:
            stored.get(names[0])
    side.write_bytes(whole)
    with Logprobs(side) as stored:
        assert stored.get(names[1]) is not None


def test_a_missing_file_is_an_error_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, check=lambda e: e.code == "file-unreadable" and "traces.logprobs" in e.message):
        Logprobs(logprobs_path(tmp_path / "traces.jsonl"))


def test_a_full_disk_leaves_neither_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "traces.jsonl"
    top = logits_to_top(np.random.default_rng(0), 3, 2, 50, 2.0)
    write(path, 0, top)
    sizes = path.stat().st_size, logprobs_path(path).stat().st_size
    for limit in (0, 10, 36, sizes[1], sizes[1] + 1, sizes[1] + 100):
        with TraceStore(path) as store:
            with monkeypatch.context() as patch:
                patch.setattr("os.write", short_writes(limit))
                with pytest.raises(ArtifactError, check=lambda e: e.code == "write-failed" and "No space" in e.message):
                    store.append(make(1), completion(top))
            assert not store.has(make(1).id)
        assert (path.stat().st_size, logprobs_path(path).stat().st_size) == sizes


def short_writes(limit: int):  # type: ignore[no-untyped-def]
    """Return a write that takes `limit` bytes in all, fifty at a time at most, and then no more."""
    import os

    real, room = os.write, [limit]

    def write(file: int, data: bytes) -> int:
        taken = min(room[0], 50, len(data))
        if taken == 0:
            raise OSError(28, "No space left on device")
        room[0] -= taken
        return real(file, data[:taken])

    return write
