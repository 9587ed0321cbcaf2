"""How traces read in a terminal."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from deepdistill.distill.records import Trace
from deepdistill.distill.traces.inspection import find_trace, inspect_traces
from deepdistill.distill.traces.show import print_report, print_run, print_trace
from deepdistill.distill.traces.summary import TraceSummary

MakeTrace = Callable[[int], Trace]


def text_of(show: object, *arguments: object) -> str:
    console = Console(file=io.StringIO(), width=100, force_terminal=False)
    show(*arguments, console)  # type: ignore[operator]
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def test_the_report_in_a_terminal(path: Path) -> None:
    shown = text_of(print_report, inspect_traces(path))
    for part in ("4 traces", "2 right, 1 wrong, 1 unknown", "1 vote", "$0.75", "source 1", "median 15", "question 3?"):
        assert part in shown
    assert "█" in shown


def test_one_trace_in_a_terminal(path: Path, make_trace: MakeTrace) -> None:
    shown = text_of(print_trace, find_trace(path, "3"))
    assert "question 2?" in shown
    assert "40+2=2" in shown
    assert "unknown by vote (75%)" in shown
    hostile = replace(make_trace(0), content="a\x1b[2Jb", messages=[{"role": "user", "content": "\x1b]0;x\x07"}])
    assert "\x1b" not in text_of(print_trace, hostile)


def test_foreign_names_are_text_and_reasons_are_counted(tmp_path: Path, make_trace: MakeTrace) -> None:
    trace = make_trace(0)
    name, reason = "x[/INST]:smile:\x1b[31m", "the reference 'abc' is not mathematics"
    odd = replace(trace, teacher=replace(trace.teacher, name=name), verdict="unknown", reason=reason, source="[/b]")
    summary = TraceSummary.of([odd, replace(odd, reason=reason.replace("abc", "d"))], tmp_path / "[/i].jsonl")
    shown = text_of(print_report, summary)
    for part in ("x[/INST]:smile:[31m", "2 unknown: the reference … is not mathematics", "[/i].jsonl"):
        assert part in shown
    assert "unknown because the reference 'abc'" in text_of(print_trace, odd)


def test_an_empty_file_in_a_terminal(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    assert "0 traces" in text_of(print_report, inspect_traces(tmp_path / "empty.jsonl"))


def test_a_run_folder_in_a_terminal() -> None:
    found = {
        "path": "runs/demo",
        "recipe": {"problems": "gym:chain_sum", "teacher": "pocket"},
        "artifacts": {"student": 2000},
        "traces": {"traces": 4, "verdicts": {"right": 2, "wrong": 1, "unknown": 1}},
        "curation": {"kept": 1, "traces": 4},
        "scores": {"student": {"accuracy": 0.745, "n": 200}, "gguf": "not yet"},
    }
    shown = text_of(print_run, found)
    for part in ("gym:chain_sum", "student 2.0 kB", "74.5% of 200", "2 right", "1 kept of 4", "not yet"):
        assert part in shown
