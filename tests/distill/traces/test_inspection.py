"""What `inspect` finds: a trace by number or id, and what a run folder has."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from deepdistill.distill.records import Trace
from deepdistill.distill.traces.inspection import find_trace, inspect_run, inspect_traces
from deepdistill.distill.traces.store import TraceStore
from deepdistill.errors import ArtifactError, UsageError

MakeTrace = Callable[[int], Trace]


def test_a_trace_is_found_by_number_or_id(path: Path, make_trace: MakeTrace) -> None:
    wanted = make_trace(2)
    for which in ("3", wanted.id, wanted.id[:8], wanted.id[:4]):
        assert find_trace(path, which).id == wanted.id
        assert find_trace(path, which).agreement == 0.75
    for which in ("0", "5", "zzzz", wanted.id[:2] + "zz", "-1", ""):
        with pytest.raises(UsageError, check=lambda error: error.code == "no-such-trace"):
            find_trace(path, which)


def test_ids_that_begin_alike(tmp_path: Path, make_trace: MakeTrace) -> None:
    path = tmp_path / "t.jsonl"
    with TraceStore(path) as store:
        for end in "ab":
            store.append(replace(make_trace(0), id="abcd" * 7 + "000" + end))
    with pytest.raises(UsageError, check=lambda error: error.code == "ambiguous-id"):
        find_trace(path, "abcd")
    assert find_trace(path, "abcd" * 7 + "000b").id.endswith("b")


def test_an_empty_and_a_missing_file(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    report = inspect_traces(tmp_path / "empty.jsonl")
    assert (report.n_traces, report.to_json()["lengths"]["max"]) == (0, 0)
    with pytest.raises(ArtifactError, check=lambda error: error.code == "file-unreadable"):
        inspect_traces(tmp_path / "none.jsonl")


def test_a_run_folder(path: Path) -> None:
    folder = path.parent
    with pytest.raises(ArtifactError, check=lambda error: error.code == "not-a-run"):
        inspect_run(folder)
    (folder / "recipe.json").write_text(json.dumps({"problems": "gym:chain_sum", "teacher": "pocket"}))
    (folder / "scores.json").write_text(json.dumps({"student": {"accuracy": 0.745, "n": 200}}))
    (folder / "student").mkdir()
    (folder / "student" / "model.safetensors").write_bytes(b"x" * 2000)
    found = inspect_run(folder)
    assert found["artifacts"]["student"] == 2000
    assert found["traces"]["traces"] == 4
    assert found["curation"] is None
    (folder / "scores.json").write_text("{")
    with pytest.raises(ArtifactError, check=lambda e: e.code == "json-broken" and "scores.json" in e.message):
        inspect_run(folder)
