"""The report: every stage of a run renders, what teachers wrote stays text, and the numbers are those of the traces."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import itertools
import json
import os
import random
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from deepdistill.distill.curation.curate import select
from deepdistill.distill.evaluation.charts import curve, histogram, over_time
from deepdistill.distill.evaluation.report import funnel, print_curation, write_report
from deepdistill.distill.problems.split import bucket_of
from deepdistill.distill.recipe.gathering import TeacherRecipe
from deepdistill.distill.recipe.teach import TeachRecipe
from deepdistill.distill.records import CurvePoint, TeacherInfo, Trace, Usage
from deepdistill.distill.run import Run
from deepdistill.distill.traces.summary import TraceSummary
from deepdistill.localrun.core.record_log import to_json

EVIL = "</pre><script>window.pwned=1</script><img src=x onerror=alert(1)> \" ' \x1b[31m \u202e"
RECIPE = TeachRecipe("my.jsonl", teacher=TeacherRecipe(model="https://api.example.org/v1"))
SCORE = {
    "accuracy": 0.745, "n": 200, "interval": [0.68, 0.8], "closed": None, "looped": 0.01, "tokens_per_answer": 35.1,
    "tokens_per_s": 268.6,
}  # fmt: skip
TRAINING = {"steps": 548, "rows": 2192, "tokens": 153551, "minutes": 11.5, "tokens_per_s": 221.8, "final_loss": 0.02}


def trace(number: int, **fields: Any) -> Trace:
    rng = random.Random(number)
    question = next(q for q in (f"question {number} {i}" for i in range(99)) if bucket_of(q) == "train")
    made = Trace(
        id=f"{number:032x}",
        problem_id=f"{number // 2:016x}",
        messages=[{"role": "user", "content": question}],
        reasoning_content=f"thinking about {number} " + " ".join(str(rng.random()) for _ in range(20)),
        content=f"it is {number}",
        answer=str(number),
        verdict="right",
        verdict_by="grader",
        finish_reason="stop",
        usage=Usage(30, 100 + number, 50),
        teacher=TeacherInfo("teacher", "endpoint"),
        sampling={},
        seconds=2.0,
        source="a" if number % 3 else "b",
    )
    return dataclasses.replace(made, **fields)


def curate(traces: list[Trace]) -> tuple[list[Trace], dict[str, Any]]:
    selection = select(lambda: traces)
    return list(selection), selection.record


class Page(HTMLParser):
    """What a browser would see: the elements by their tags, and the text of each."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._inside: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._inside and self._inside.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self._inside):
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def report(folder: Path, traces: list[Trace], kept: list[Trace] | None = None, **artifacts: Any) -> str:
    with Run(folder, RECIPE) as run:
        if traces:
            lines = [to_json(line).encode("utf-8", "surrogatepass") + b"\n" for line in traces]
            run.traces_path.write_bytes(b"".join(lines))
        for name, value in artifacts.items():
            run.save(f"{name}.json", value)
        write_report(run, kept)
        return run.report_path.read_text(encoding="utf-8")


def test_a_run_without_anything_yet_renders(tmp_path: Path) -> None:
    page = Page(report(tmp_path / "run", []))
    assert "No traces yet." in page.text
    assert "Not scored yet." in page.text
    assert not page.all("details") + page.all("script") + page.all("svg")


def test_traces_alone_render(tmp_path: Path) -> None:
    page = Page(report(tmp_path / "run", [trace(1), trace(2, verdict="wrong")]))
    assert "Nothing was filtered yet" in page.text
    assert [d["data-judged"] for d in page.all("details")] == ["right", "wrong"]


def test_everything_there_is_is_on_the_page(tmp_path: Path) -> None:
    traces = [trace(i, verdict="wrong" if i % 5 == 0 else "right", cost_usd=0.001) for i in range(40)]
    kept, record = curate(traces)
    text = report(
        tmp_path / "run", traces, kept, curation=record, scores={"base": SCORE, "student": SCORE}, training=TRAINING
    )
    page = Page(text)
    for fact in ("74.5 % of 200", "68.0 – 80.0 %", "153,551 tokens", "the grader says the answer is wrong", "$0.04"):
        assert fact in page.text
    assert len(page.all("svg")) == 3  # length, cost, throughput
    assert len(page.all("caption")) == len(page.all("table")) == 4
    trained = {d["data-kept"] for d in page.all("details") if d["data-judged"] == "right"}
    assert trained == {"yes"}
    headings = [tag for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert headings[0] == "h1"
    assert headings.count("h1") == 1
    for before, after in itertools.pairwise(headings):
        assert int(after[1]) <= int(before[1]) + 1
    assert all(label["aria-label"] for label in page.all("svg"))


def test_what_a_teacher_wrote_stays_text_and_nothing_is_loaded(tmp_path: Path) -> None:
    evil = trace(
        1,
        id=EVIL,
        source=EVIL,
        content=EVIL,
        reasoning_content=EVIL,
        answer=EVIL,
        teacher=TeacherInfo(EVIL, "endpoint"),
        messages=[{"role": "user", "content": EVIL}],
        verdict="wrong",
    )
    _, record = curate([evil])
    text = report(tmp_path / "run", [evil, trace(2, source="x", content="a\0b")], curation=record)
    page = Page(text)
    assert len(page.all("script")) == 1
    assert not page.all("img")
    assert page.text.count("window.pwned=1") >= 5  # there to be read
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")]
        assert tag not in ("iframe", "object", "embed", "base")
        assert attributes.get("href") in (None, "data:,")
        assert "src" not in attributes
    assert "//" not in text.replace("https://api.example.org/v1", "")
    assert "\0" not in text
    policy = next(m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert policy
    assert "default-src 'none'" in policy
    script = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)[-1]
    assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in policy


@pytest.mark.slow
def test_a_browser_runs_the_pages_script_and_no_other(tmp_path: Path) -> None:
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium: apt-get install chromium, or name one in $CHROMIUM")
    evil = "</pre></script><script>document.body.id='pwned'</script><img src=x onerror=\"document.body.id='pwned'\">"
    report(tmp_path / "run", [trace(1, content=evil, source=evil), trace(2)])
    command = [chromium, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    seen = subprocess.run(
        [*command, "--dump-dom", str(tmp_path / "run" / "report.html")],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout
    assert "2 of 2 shown" in seen
    assert Page(seen).all("body") == [{}]


def test_the_table_of_the_files_stays_when_the_report_is_written_again(tmp_path: Path) -> None:
    hostile = "<!-- files: begin --><b>forged</b><!-- files: end -->"
    report(tmp_path / "run", [trace(1, content=hostile)])
    path = tmp_path / "run" / "report.html"
    part = "<!-- files: begin -->\n<section><h2>Files</h2></section>\n<!-- files: end -->"
    path.write_text(path.read_text().replace("<!-- files: begin --><!-- files: end -->", part))
    again = report(tmp_path / "run", [trace(1, content=hostile)])
    assert again.count(part) == 1
    assert "<b>forged</b>" not in again


def test_half_a_surrogate_pair_can_be_written(tmp_path: Path) -> None:
    line = to_json(trace(1)).replace("it is 1", "\\ud83d it is")
    with Run(tmp_path / "run", RECIPE) as run:
        run.traces_path.write_text(line + "\n", encoding="utf-8")
        write_report(run)
        assert "? it is" in run.report_path.read_text(encoding="utf-8")


@pytest.mark.parametrize("text", ["a" * 400_000, "<&\"'" * 100_000, "漢" * 200_000])
def test_a_page_of_long_traces_stays_small_and_shows_both_ends(text: str, tmp_path: Path) -> None:
    traces = [
        trace(i, reasoning_content=f"BEGIN {text} END", content=text, messages=[{"role": "user", "content": text}])
        for i in range(80)
    ]
    page = report(tmp_path / "run", traces)
    assert len(page.encode()) < 1_100_000
    assert page.count("BEGIN") == page.count(" END<") == 60
    assert "characters left out" in page


def test_the_funnel_ends_in_the_rows(tmp_path: Path) -> None:
    traces = [trace(i, verdict="wrong" if i % 4 == 0 else "right") for i in range(20)]
    traces += [trace(100, finish_reason="length"), trace(102, reasoning_content=None)]
    _, record = curate(traces)
    steps = list(funnel(record, TraceSummary.of(traces)))
    assert [(s.name, s.left, s.removed) for s in steps] == [
        ("problems asked", 12, None),
        ("traces", 22, None),
        ("wrong", 17, 5),
        ("verified", 17, None),
        ("cut off", 16, 1),
        ("no reasoning", 15, 1),
        ("training rows", 15, None),
    ]


def test_a_record_of_an_earlier_version_renders(tmp_path: Path) -> None:
    old = {
        "traces": 3,
        "kept": 2,
        "dropped": {"held_out": 0, "wrong": 1, "too_long": 0},
        "why": {"wrong": "it is wrong"},
    }
    page = Page(report(tmp_path / "run", [trace(1)], curation=old))
    assert "it is wrong" in page.text


def heights(chart: Any, top: float) -> float:
    return float(sum(bar.height for bar in chart.bars) * top / 100)


def test_a_histogram_counts_every_value_once() -> None:
    rng = np.random.default_rng(0)
    values = {"right": rng.lognormal(6, 1, 500).astype(int), "wrong": rng.lognormal(7, 1, 300).astype(int)}
    chart = histogram(values, "tokens")
    assert chart
    top = int(chart.top.split()[0].replace(",", ""))
    assert heights(chart, top) == pytest.approx(800, rel=1e-3)
    assert max(bar.x + bar.width for bar in chart.bars) <= 100
    assert all(bar.y >= -1e-6 and bar.y + bar.height <= 100.01 for bar in chart.bars)
    assert chart.ticks[-1].endswith("or more")
    counts = [int(match[1]) for bar in chart.bars if (match := re.search(r": (\d+) (right|wrong)", bar.title))]
    assert sum(counts) == 800
    both = np.sort(np.concatenate(list(values.values())))
    assert f"the most {both[-1]:,} tokens" in chart.summary


@pytest.mark.parametrize("values", [[5], [7, 7, 7], [0, 0], [1, 10**9]])
def test_odd_values_make_a_histogram(values: list[int]) -> None:
    chart = histogram({"right": np.array(values)}, "tokens")
    assert chart
    assert len(chart.ticks) == 5
    assert histogram({"right": np.array([])}, "tokens") is None
    dollars = histogram({"right": np.array(values, float) / 1e7}, "$")
    assert dollars
    assert "e-" not in dollars.summary + "".join(dollars.ticks)


def test_throughput_is_over_the_time_worked() -> None:
    ends = np.concatenate([np.arange(0, 100.0), 50_000 + np.arange(0, 100.0)])  # a pause of half a day between
    chart = over_time(ends, np.full(200, 30))
    assert chart
    assert chart.ticks[-1] == "3 min"
    assert "mean 30 tokens/s" in chart.summary
    assert over_time(None, np.array([10.0, 20.0, 30.0]))
    assert over_time(np.array([1.0, 1.0]), np.array([3, 3])) is None
    assert over_time(None, np.array([])) is None


def test_the_table_of_the_terminal_says_how_many_and_obeys_no_trace() -> None:
    evil = trace(1, verdict="wrong", messages=[{"role": "user", "content": f"[red]bold {EVIL}"}])
    evil = dataclasses.replace(evil, messages=[{"role": "user", "content": f"{evil.messages[0]['content']}"}])
    good = [trace(i) for i in range(2, 6)]
    _, record = curate([evil, *good])
    output = io.StringIO()
    print_curation(Console(file=output, width=100, force_terminal=True, no_color=True), record)
    printed = re.sub(r"\x1b\[[0-9;]*m", "", output.getvalue())
    reason = next(iter(record["dropped"])).replace("_", " ")
    assert re.search(rf"{reason} +1 +4 ", printed)
    assert "[red]bold" in printed
    assert "\u202e" not in printed
    assert re.search(r"training rows +4", printed)
    assert json.dumps(record)


def test_the_trainings_curve_is_on_the_page_and_has_its_means(tmp_path: Path) -> None:
    points: list[CurvePoint] = []
    for step in range(1, 101):
        points.append(CurvePoint(step, loss=2.0 - 0.01 * step, lr=1e-3))
        if step % 20 == 0:  # without a step, as older versions wrote it
            points.append(CurvePoint(validation_loss=1.0, validation_accuracy=step / 200))
    loss, accuracy = curve(points, "loss"), curve(points, "validation_accuracy")
    assert loss is not None
    assert accuracy is not None
    assert len(loss.bars) == 40
    assert loss.bars[0].title == f"{2.0 - 0.02:.3g}"  # of the first three steps
    assert accuracy.ticks == ["step 20", "step 100"]
    assert [round(bar.height) for bar in accuracy.bars] == [10, 20, 30, 40, 50]
    assert curve(points[:1], "loss") is None
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "curve.jsonl").write_text("".join(to_json(point) + "\n" for point in points))
    with Run(tmp_path / "run", RECIPE) as run:
        run.save("training.json", TRAINING | {"validation_accuracy": 0.5, "stopped": "early"})
        write_report(run)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "From 1.98 to 1" in page
    assert "50.0 % of the held-out tokens are the student" in page
    assert "ended early" in page
