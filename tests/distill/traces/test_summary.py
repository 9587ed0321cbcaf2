"""What `inspect` says of a traces file, counted by hand; and how a trace reads in a terminal."""

from __future__ import annotations

import io
import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from deepdistill.distill.records import Grade, Problem, TeacherInfo, Trace, Usage
from deepdistill.distill.traces.inspection import find_trace, inspect_run, inspect_traces
from deepdistill.distill.traces.show import print_report, print_run, print_trace
from deepdistill.distill.traces.store import Judgement, TraceStore
from deepdistill.distill.traces.summary import TraceSummary
from deepdistill.errors import ArtifactError, UsageError
from deepdistill.localrun.core.generation import Completion, Sampling


def make(index: int) -> Trace:
    problem = Problem(f"p{index}", f"question {index}?", "42", f"source {index % 2}", "math")
    done = Completion("**42**", f"40+2={index}", True, "stop", 10, 5 * (index + 1), 3, 0.5)
    info = TeacherInfo("t", "gguf")
    grade = Grade("42", "right", "grader", 1.0)
    return replace(Trace.make(problem, done, grade=grade, info=info, teacher="t", sampling=Sampling()), cost_usd=0.25)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "traces.jsonl"
    with TraceStore(path) as store:
        for trace in (
            make(0),
            replace(make(1), verdict="wrong", cost_usd=None),
            replace(make(2), verdict="unknown", verdict_by="none", finish_reason="loop"),
            make(3),
        ):
            store.append(trace)
        store.append_judgements([Judgement(make(2).id, "vote", 0.75)])
    return path


def text_of(show: object, *arguments: object) -> str:
    console = Console(file=io.StringIO(), width=100, force_terminal=False)
    show(*arguments, console)  # type: ignore[operator]
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def test_counts(path: Path) -> None:
    report = inspect_traces(path).to_json()
    assert report["traces"] == 4
    assert report["verdicts"] == {"right": 2, "wrong": 1, "unknown": 1}
    assert report["verdict_by"] == {"grader": 3, "vote": 1}
    assert report["finish_reasons"] == {"stop": 3, "loop": 1}
    assert report["sources"] == {"source 0": {"right": 1, "unknown": 1}, "source 1": {"wrong": 1, "right": 1}}
    assert report["tokens"] == {"prompt": 40, "completion": 50, "reasoning": 12}
    assert report["cost_usd"] == 0.75
    assert report["teachers"] == {"t (gguf)": 4}
    assert report["lengths"] == {"unit": "tokens", "p10": 5, "median": 15, "p90": 20, "max": 20}
    assert [one["number"] for one in report["examples"]["longest"]] == [4, 3, 2]
    assert [one["id"] for one in report["examples"]["wrong"]] == [make(1).id]
    assert [one["finish_reason"] for one in report["examples"]["cut"]] == ["loop"]
    assert report["bytes"] == path.stat().st_size + (path.parent / "traces.verdicts.jsonl").stat().st_size
    assert json.loads(json.dumps(report)) == report


def test_the_histogram_holds_every_trace_once(path: Path) -> None:
    report = inspect_traces(path)
    for n_bins in range(1, 30):
        bins = report.histogram(n_bins)
        assert sum(n for *_, n in bins) == 4
        assert len(bins) <= n_bins
        assert (bins[0][0], bins[-1][1]) == (5, 20)
        assert all(before[1] + 1 == after[0] for before, after in itertools.pairwise(bins))
    assert TraceSummary(path).histogram() == []


def test_without_token_counts_lengths_are_characters(tmp_path: Path) -> None:
    with TraceStore(tmp_path / "t.jsonl") as store:
        store.append(replace(make(0), usage=Usage(0, 0, 0), content="x" * 30, reasoning_content="y" * 12))
    report = inspect_traces(tmp_path / "t.jsonl").to_json()
    assert report["lengths"]["unit"] == "characters"
    assert report["lengths"]["max"] == 42
    assert report["examples"]["longest"][0]["length"] == 42


def test_the_report_in_a_terminal(path: Path) -> None:
    shown = text_of(print_report, inspect_traces(path))
    for part in ("4 traces", "2 right, 1 wrong, 1 unknown", "1 vote", "$0.75", "source 1", "median 15", "question 3?"):
        assert part in shown
    assert "█" in shown


def test_one_trace_in_a_terminal(path: Path) -> None:
    shown = text_of(print_trace, find_trace(path, "3"))
    assert "question 2?" in shown
    assert "40+2=2" in shown
    assert "unknown by vote (75%)" in shown
    hostile = replace(make(0), content="a\x1b[2Jb", messages=[{"role": "user", "content": "\x1b]0;x\x07"}])
    assert "\x1b" not in text_of(print_trace, hostile)


def test_a_trace_is_found_by_number_or_id(path: Path) -> None:
    wanted = make(2)
    for which in ("3", wanted.id, wanted.id[:8], wanted.id[:4]):
        assert find_trace(path, which).id == wanted.id
        assert find_trace(path, which).agreement == 0.75
    for which in ("0", "5", "zzzz", wanted.id[:2] + "zz", "-1", ""):
        with pytest.raises(UsageError, check=lambda error: error.code == "no-such-trace"):
            find_trace(path, which)


def test_ids_that_begin_alike(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    with TraceStore(path) as store:
        for end in "ab":
            store.append(replace(make(0), id="abcd" * 7 + "000" + end))
    with pytest.raises(UsageError, check=lambda error: error.code == "ambiguous-id"):
        find_trace(path, "abcd")
    assert find_trace(path, "abcd" * 7 + "000b").id.endswith("b")


def test_an_empty_and_a_missing_file(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    report = inspect_traces(tmp_path / "empty.jsonl")
    assert (report.n_traces, report.to_json()["lengths"]["max"]) == (0, 0)
    assert "0 traces" in text_of(print_report, report)
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
    shown = text_of(print_run, found)
    for part in ("gym:chain_sum", "student 2.0 kB", "74.5% of 200", "2 right"):
        assert part in shown
    (folder / "scores.json").write_text("{")
    with pytest.raises(ArtifactError, check=lambda e: e.code == "json-broken" and "scores.json" in e.message):
        inspect_run(folder)
