"""What a summary counts, checked by hand."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from deepdistill.distill.records import Trace, Usage
from deepdistill.distill.traces.inspection import inspect_traces
from deepdistill.distill.traces.store import TraceStore
from deepdistill.distill.traces.summary import TraceSummary

MakeTrace = Callable[[int], Trace]


def test_counts(path: Path, make_trace: MakeTrace) -> None:
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
    assert [one["id"] for one in report["examples"]["wrong"]] == [make_trace(1).id]
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


def test_without_token_counts_lengths_are_characters(tmp_path: Path, make_trace: MakeTrace) -> None:
    with TraceStore(tmp_path / "t.jsonl") as store:
        store.append(replace(make_trace(0), usage=Usage(0, 0, 0), content="x" * 30, reasoning_content="y" * 12))
    report = inspect_traces(tmp_path / "t.jsonl").to_json()
    assert report["lengths"]["unit"] == "characters"
    assert report["lengths"]["max"] == 42
    assert report["examples"]["longest"][0]["length"] == 42


def test_verdicts_are_counted_by_source_and_votes_apart(make_trace: MakeTrace) -> None:
    right = replace(make_trace(1), source="a")
    favoured = replace(make_trace(2), source="a", verdict="unknown", verdict_by="vote", cost_usd=None)
    unknown = replace(make_trace(3), source="", verdict="unknown", verdict_by="none")
    summary = TraceSummary.of([right, favoured, unknown])
    assert summary.sources == {"a": {"right": 1, "vote": 1}, "": {"unknown": 1}}
    assert summary.verdicts_by_source() == {"a": {"right": 1, "unknown": 1}, "unknown": {"unknown": 1}}
    assert (summary.n_problems, summary.n_traces, summary.cost_usd) == (3, 3, 0.5)
    assert TraceSummary.of([favoured]).cost_usd is None


def test_of_many_sources_the_later_ones_are_counted_together(make_trace: MakeTrace) -> None:
    summary = TraceSummary.of(replace(make_trace(i), source=f"s{i}") for i in range(60))
    assert len(summary.sources) == 51
    assert summary.sources["other"] == {"right": 10}


def test_the_sample_is_the_same_each_time_and_shares_the_room_between_verdicts(make_trace: MakeTrace) -> None:
    made = [make_trace(i) for i in range(1000)]
    traces = [replace(trace, verdict="wrong") if i % 50 == 0 else trace for i, trace in enumerate(made)]
    sample = TraceSummary.of(traces).sample()
    assert TraceSummary.of(traces).sample() == sample
    assert len(sample) == 60
    assert sum(trace.verdict == "wrong" for trace in sample) == 20
    places = [traces.index(trace) for trace in sample]
    assert places == sorted(places)
    assert places[0] < 200 < 800 < places[-1], "not the first ones"
