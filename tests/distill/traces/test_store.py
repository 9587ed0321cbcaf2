"""The trace store: what was appended is there after any death, and nothing else ever is."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deepdistill.distill.records import Grade, Problem, TeacherInfo, Trace, trace_id
from deepdistill.distill.traces.store import Judgement, TraceStore
from deepdistill.errors import ArtifactError
from deepdistill.localrun.core.generation import Completion, Sampling
from deepdistill.localrun.core.record_log import from_json, to_json

INFO = TeacherInfo("pocket", "pocket", "abc")


def make(index: int, content: str = "42", reasoning: str | None = "40+2=42") -> Trace:
    problem = Problem(f"p{index}", f"question {index}?", "42", "test", "math")
    completion = Completion(content, reasoning, True, "stop", 10, 5, 3, 0.5)
    return Trace.make(
        problem,
        completion,
        grade=Grade("42", "right", "grader", 1.0),
        info=INFO,
        teacher="pocket",
        sampling=Sampling(),
        sample=0,
    )


def test_a_trace_has_the_fields_of_the_format() -> None:
    record = json.loads(to_json(make(1)))
    assert record["usage"] == {"prompt": 10, "completion": 5, "reasoning": 3}
    assert record["teacher"] == {"name": "pocket", "backend": "pocket", "revision": "abc", "vocabulary": None}
    assert record["messages"] == [{"role": "user", "content": "question 1?"}]
    assert (record["verdict"], record["verdict_by"], record["cost_usd"]) == ("right", "grader", None)
    assert (record["reasoning_content"], record["content"]) == ("40+2=42", "42")


@given(st.text(), st.one_of(st.none(), st.text()))
@settings(max_examples=100, deadline=None)
def test_json_and_back(content: str, reasoning: str | None) -> None:
    trace = make(0, content, reasoning)
    line = to_json(trace)
    assert "\n" not in line
    assert from_json(Trace, line) == trace


def test_ids_tell_requests_apart_and_stay_the_same() -> None:
    base = trace_id("p", "pocket", sampling=Sampling(), sample=0)
    others = [
        trace_id("q", "pocket", sampling=Sampling(), sample=0),
        trace_id("p", "hf:a/b", sampling=Sampling(), sample=0),
        trace_id("p", "pocket", sampling=Sampling(temperature=0.5), sample=0),
        trace_id("p", "pocket", sampling=Sampling(), sample=1),
    ]
    assert len({base, *others}) == 5
    assert base == trace_id("p", "pocket", sampling=Sampling(), sample=0)
    assert base == "8452e10804b33bd49eb5da229ab4d978", "traces of older runs would be asked for again"


def test_append_and_read_again(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "traces.jsonl"
    with TraceStore(path) as store:
        for i in range(3):
            store.append(make(i))
        store.append(make(1))
        assert len(store) == 3
        assert store.has(make(2).id)
        assert not store.has(make(3).id)
        assert list(store) == [make(0), make(1), make(2)]
    with TraceStore(path) as store:
        assert store.repairs == []
        store.append(make(3))
    assert list(TraceStore.read(path)) == [make(i) for i in range(4)]


def test_a_last_line_torn_at_any_byte_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "traces.jsonl"
    whole = [(to_json(make(i, "naïve – 42 ✓")) + "\n").encode() for i in range(3)]
    kept = b"".join(whole[:2])
    for cut in range(len(whole[2])):
        path.write_bytes(kept + whole[2][:cut])
        assert len(list(TraceStore.read(path))) == 2, "reading alone leaves it out"
        assert path.stat().st_size == len(kept) + cut, "and leaves it alone"
        with TraceStore(path) as store:
            assert len(store) == 2
            assert store.repairs == ([f"traces.jsonl: cut off a torn last line of {cut} bytes"] if cut else [])
            if cut % 50 == 49:
                store.append(make(7))
        assert [t.problem_id for t in TraceStore.read(path)] == ["p0", "p1"] + ["p7"] * (cut % 50 == 49)


@given(st.binary(min_size=1, max_size=40).filter(lambda b: b"\n" not in b and b.strip()), st.integers(0, 2))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_broken_line_is_named_and_nothing_is_overwritten(tmp_path: Path, junk: bytes, at: int) -> None:
    path = tmp_path / "traces.jsonl"
    lines = [(to_json(make(i)) + "\n").encode() for i in range(3)]
    lines.insert(at, junk + b"\n")
    path.write_bytes(b"".join(lines))
    with pytest.raises(
        ArtifactError, check=lambda e: e.code == "line-broken" and f"traces.jsonl:{at + 1}" in e.message
    ):
        TraceStore(path)
    assert path.read_bytes() == b"".join(lines)


def test_a_line_that_is_json_but_no_trace_is_broken_too(tmp_path: Path) -> None:
    path = tmp_path / "traces.jsonl"
    record = json.loads(to_json(make(0)))
    for bad in ({}, record | {"verdict": "maybe"}, record | {"usage": 3}, {k: record[k] for k in list(record)[1:]}):
        path.write_text(json.dumps(bad) + "\n", encoding="utf-8")
        with pytest.raises(ArtifactError, check=lambda error: error.code == "line-broken" and ":1" in error.message):
            TraceStore(path)


def test_fields_of_a_newer_version_are_read_over() -> None:
    assert from_json(Trace, json.dumps(json.loads(to_json(make(0))) | {"later": 1})) == make(0)


def test_a_missing_file_and_a_folder_in_its_place(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, check=lambda error: error.code == "file-unreadable"):
        list(TraceStore.read(tmp_path / "none.jsonl"))
    with pytest.raises(ArtifactError):
        TraceStore(tmp_path)


def test_a_second_writer_is_told_who_holds_the_file(tmp_path: Path) -> None:
    path = tmp_path / "traces.jsonl"
    script = WRITER.format(tests=str(Path(__file__).parent), path=str(path))
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        holder = f"process {writer.pid} on {socket.gethostname()} since 20"
        with pytest.raises(ArtifactError, check=lambda error: error.code == "file-locked" and holder in error.message):
            TraceStore(path)
        list(TraceStore.read(path))  # who only reads is let in
        writer.send_signal(signal.SIGKILL)
        writer.stdout.read()
    with TraceStore(path) as store:  # a killed writer holds nothing
        with pytest.raises(ArtifactError, check=lambda e: e.code == "file-locked" and str(os.getpid()) in e.message):
            TraceStore(path)
        assert store.repairs == [] or "torn last line" in store.repairs[0]
    TraceStore(path).close()


def test_a_failed_opening_gives_the_lock_back(tmp_path: Path) -> None:
    path = tmp_path / "traces.jsonl"
    path.write_text("junk\n", encoding="utf-8")
    with pytest.raises(ArtifactError, check=lambda error: error.code == "line-broken"):
        TraceStore(path)
    path.unlink()
    TraceStore(path).close()


def test_a_file_that_another_program_changed_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "traces.jsonl"

    def add(spoil: Callable[[], object]) -> None:
        with TraceStore(path) as store:
            store.append(make(0))
            spoil()
            with pytest.raises(ArtifactError, check=lambda error: error.code == "file-changed"):
                store.append(make(1))
            assert not store.has(make(1).id)

    add(lambda: path.write_bytes(path.read_bytes() + b"{}"))
    path.unlink()
    add(path.unlink)
    add(lambda: (path.rename(tmp_path / "old"), path.write_text("")))


def test_judgements_stand_beside_and_the_last_counts(tmp_path: Path) -> None:
    path = tmp_path / "traces.jsonl"
    unsure = [replace(make(i), verdict="unknown", verdict_by="none") for i in range(3)]
    with TraceStore(path) as store:
        for trace in [*unsure, make(3)]:
            store.append(trace)
        before = path.read_bytes()
        store.append_judgements([Judgement(unsure[0].id, "vote", 0.75), Judgement(unsure[1].id, "judge", 1.0)])
        store.append_judgements(Judgement(trace.id, "vote", 0.5) for trace in (unsure[1], make(3)))
        store.append_judgements([Judgement(unsure[0].id, "none", 0.25)])
        found = [(t.verdict, t.verdict_by, t.agreement) for t in store]
    assert found == [
        ("unknown", "none", 0.25),
        ("unknown", "vote", 0.5),
        ("unknown", "none", None),
        ("right", "grader", 0.5),
    ]
    assert path.read_bytes() == before
    with TraceStore(path) as store:
        assert [(t.verdict, t.verdict_by, t.agreement) for t in store] == found
        store.append_judgements([Judgement(unsure[2].id, "vote", 1.0)])
    lines = (tmp_path / "traces.verdicts.jsonl").read_text().splitlines()
    assert json.loads(lines[-1]) == {"id": unsure[2].id, "verdict_by": "vote", "agreement": 1.0}


def test_a_torn_judgement_is_cut_off_and_a_broken_one_is_named(tmp_path: Path) -> None:
    path, side = tmp_path / "traces.jsonl", tmp_path / "traces.verdicts.jsonl"
    with TraceStore(path) as store:
        store.append(make(0))
        store.append_judgements([Judgement(make(0).id, "vote", 0.5)])
    whole = side.read_bytes()
    for cut in range(1, len(whole)):
        side.write_bytes(whole + whole[:cut])
        assert [t.agreement for t in TraceStore.read(path)] == [0.5]
        with TraceStore(path) as store:
            assert store.repairs == [f"traces.verdicts.jsonl: cut off a torn last line of {cut} bytes"]
        assert side.read_bytes() == whole
    for junk in (b"{}\n", b'{"id": "a", "verdict_by": "grader", "agreement": 1.0}\n', b"[]\n"):
        side.write_bytes(whole + junk)
        with pytest.raises(ArtifactError, check=lambda e: e.code == "line-broken" and "verdicts.jsonl:2" in e.message):
            list(TraceStore.read(path))


def test_the_disk_is_asked_to_keep_what_was_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, synced = os.fsync, []
    monkeypatch.setattr(os, "fsync", lambda file: (synced.append(os.fstat(file).st_size), real(file)))
    with TraceStore(tmp_path / "a.jsonl", sync_every_s=0) as store:
        store.append(make(0))
        assert synced[-1] == (tmp_path / "a.jsonl").stat().st_size
    with TraceStore(tmp_path / "b.jsonl", sync_every_s=0.02) as store:
        store.append(make(0))
        store.append(make(1))
        size = (tmp_path / "b.jsonl").stat().st_size
        deadline = time.monotonic() + 20
        while synced[-1] != size and time.monotonic() < deadline:
            time.sleep(0.01)
        assert synced[-1] == size, "though nothing more was added"


def test_after_a_failed_sync_nothing_is_promised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: int) -> None:
        raise OSError(5, "Input/output error")

    with TraceStore(tmp_path / "traces.jsonl", sync_every_s=0) as store:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", refuse)
            with pytest.raises(ArtifactError, check=lambda error: error.code == "write-failed"):
                store.append(make(0))
        with pytest.raises(ArtifactError, check=lambda error: error.code == "write-failed"):
            store.append(make(1))


def test_traces_of_older_versions_are_read(tmp_path: Path) -> None:
    record = json.loads(to_json(make(0)))
    for name in ("source", "sample", "n_logprobs", "agreement"):
        del record[name]
    old = from_json(Trace, json.dumps(record))
    assert (old.source, old.sample, old.n_logprobs, old.agreement) == ("", 0, 0, None)


def test_a_full_disk_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "traces.jsonl"
    real = os.write
    with TraceStore(path) as store:
        store.append(make(0))
        calls = iter([40])

        def full(file: int, data: bytes) -> int:
            room = next(calls, None)
            if room is None:
                raise OSError(28, "No space left on device")
            return real(file, data[:room])

        monkeypatch.setattr(os, "write", full)
        with pytest.raises(ArtifactError, check=lambda e: e.code == "write-failed" and "No space left" in e.message):
            store.append(make(1))
        monkeypatch.setattr(os, "write", real)
        assert not store.has(make(1).id)
        store.append(replace(make(1), content="again"))
    assert [t.content for t in TraceStore.read(path)] == ["42", "again"]


WRITER = """
import sys
from pathlib import Path
from deepdistill.distill.traces.store import TraceStore
sys.path.insert(0, {tests!r})
from test_store import make
with TraceStore(Path({path!r})) as store:
    start = len(store)
    print("open", start, flush=True)
    for i in range(start, 10**6):
        store.append(make(i, "x" * (i * 37 % 9000)))
        print(i, flush=True)
"""


def test_kill_9_at_random_moments_loses_nothing_that_was_appended(tmp_path: Path) -> None:
    path = tmp_path / "traces.jsonl"
    script = WRITER.format(tests=str(Path(__file__).parent), path=str(path))
    rng, stored = random.Random(0), 0
    for _ in range(3):
        with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            assert writer.stdout.readline().split() == ["open", str(stored)]
            time.sleep(rng.uniform(0.005, 0.1))
            writer.send_signal(signal.SIGKILL)
            said = [int(line) for line in writer.stdout.read().split("\n")[:-1]]
        with TraceStore(path) as store:
            traces = list(store)
            assert [t.problem_id for t in traces] == [f"p{i}" for i in range(len(traces))]
            assert len(traces) - 1 in (max(said, default=stored - 1), max(said, default=stored - 1) + 1)
            stored = len(traces)
    assert stored > 10
