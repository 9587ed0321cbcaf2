"""The report: every stage of a run renders, what teachers wrote stays text, and the numbers are those of the traces."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import itertools
import json
import math
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
from deepdistill.distill.evaluation.charts import curve, histogram, line, over_time, ticks
from deepdistill.distill.evaluation.live import LiveReport
from deepdistill.distill.evaluation.report import funnel, print_curation, print_hops, write_report
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
    drawn = [tuple(map(float, point.split(","))) for point in accuracy.points.split()]
    places, heights_of = {text: y for y, text in accuracy.y_ticks}, {text: x for x, text in accuracy.x_ticks}
    assert list(places) == ["0 %", "20 %", "40 %", "60 %", "80 %", "100 %"]
    assert [x for x, _ in drawn] == [heights_of[text] for text in ("20", "40", "60", "80", "100")]
    assert drawn[1][1] == places["20 %"]  # of the second validation
    assert drawn[3][1] == places["40 %"]
    assert len(loss.points.split()) == 100
    assert [text for _, text in loss.y_ticks] == ["1", "1.2", "1.4", "1.6", "1.8"]
    assert curve(points[:1], "loss") is None
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "curve.jsonl").write_text("".join(to_json(point) + "\n" for point in points))
    with Run(tmp_path / "run", RECIPE) as run:
        run.save("training.json", TRAINING | {"validation_accuracy": 0.5, "stopped": "early"})
        write_report(run)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "From 1.99 to 1" in page
    assert "50.0 % of the held-out tokens are the student" in page
    assert "ended early" in page


@pytest.mark.parametrize(
    ("low", "high", "least", "expected"),
    [
        (0, 1, 0, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0, 420, 1, [0, 100, 200, 300, 400]),
        (1.13, 5.7, 0, [2, 3, 4, 5]),
        (3, 5, 1, [3, 4, 5]),
        (-0.3, 0.31, 0, [-0.2, 0, 0.2]),
        (7, 7, 1, [7]),
    ],
)
def test_ticks_are_round_and_inside(low: float, high: float, least: float, expected: list[float]) -> None:
    assert ticks(low, high, least=least) == pytest.approx(expected)


@pytest.mark.parametrize("values", [[1.0, 1.0], [0.0, 0.0], [math.nan, 2.0, math.inf, 3.0], [1e-9, 1e9]])
@pytest.mark.parametrize("is_share", [False, True])
def test_a_line_stays_in_its_drawing(values: list[float], is_share: bool) -> None:
    chart = line(range(len(values)), [min(value, 1.0) for value in values] if is_share else values, is_share=is_share)
    assert chart
    for point in chart.points.split():
        x, y = map(float, point.split(","))
        assert 50 <= x <= 410
        assert 26 <= y <= 180
    assert line([1], [1.0], is_share=is_share) is None


def answers(folder: Path, hop: str, verdicts: str, text: str = "fine") -> None:
    whole = {"r": "right", "w": "wrong", "u": "unknown"}
    records = [
        {"problem_id": f"p{i}", "question": text, "expected": text, "answer": text, "verdict": whole[letter]}
        | {"reasoning_content": text, "content": text}
        for i, letter in enumerate(verdicts)
    ]
    (folder / "answers").mkdir(parents=True, exist_ok=True)
    path = folder / "answers" / f"{hop}.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + "{torn", encoding="utf-8")


def test_base_and_student_stand_side_by_side_and_can_be_filtered(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir(mode=0o700)
    answers(folder, "base", "wwwwwwwwrru")
    answers(folder, "student", "rrrrrrrwrwr")
    answers(folder, "gguf", "rrrrrrwwrwu")
    counted = SCORE | {"accuracy": 2 / 11, "n": 11, "n_unknown": 1, "unknown": {"no number": 1}}
    scores = {"base": counted, "student": SCORE | {"accuracy": 9 / 11}}
    text = report(folder, [], scores=scores)
    page = Page(text)
    states = [details["data-state"] for details in page.all("details")]
    assert states == ["gained"] * 7 + ["lost", "still wrong", "still right", "unknown"] + ["lost", "unknown"]
    assert "7 gained, 1 lost, 1 still wrong, 1 still right, 1 unknown." in page.text
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    choices = [one for one in page.all("input") if one["name"] == "taught"]
    assert [one["value"] for one in choices] == ["all", "gained", "lost", "still wrong", "still right", "unknown"]
    assert [label["for"] for label in page.all("label")][: len(choices)] == [one["id"] for one in choices]
    for state in set(states):  # without a script
        assert f'.sides > input[value="{state}"]:checked ~ .list > :not([data-state="{state}"])' in text
    assert "9.1 %" in page.text  # unknown, of the base's answers


def test_the_headline_tells_a_difference_from_chance(tmp_path: Path) -> None:
    scores = {"base": SCORE, "student": SCORE}
    headlines = []
    for name, before, after in (
        ("better", "wwwwwwr", "rrrrrrr"),
        ("worse", "rrrrrrr", "wwwwwww"),
        ("chance", "wwwwwrr", "rrrrrww"),
        ("unscored", "", ""),
    ):
        (tmp_path / name).mkdir(mode=0o700)
        answers(tmp_path / name, "base", before)
        answers(tmp_path / name, "student", after)
        text = report(tmp_path / name, [], scores=scores if name != "unscored" else {})
        headlines.append(re.findall(r'<p class="headline">(.*?)</p>', text))
    assert "better" in headlines[0][0]
    assert "worse" in headlines[1][0]
    assert "chance" in headlines[2][0]
    assert headlines[3] == []


def test_what_a_student_answered_stays_text_and_a_page_of_long_answers_small(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir(mode=0o700)
    for hop in ("base", "student", "gguf"):
        answers(folder, hop, "rwu" * 70, EVIL + "x" * 100_000)
    text = report(folder, [], scores={"base": SCORE, "student": SCORE, EVIL: SCORE})
    page = Page(text)
    assert not page.all("script") + page.all("img")
    assert page.text.count("window.pwned=1") > 100
    assert len(text.encode()) < 700_000
    assert {details["data-state"] for details in page.all("details")} == {"still right", "still wrong", "unknown"}


def test_the_page_reloads_itself_only_while_the_run_works(tmp_path: Path, recorder: Any) -> None:
    times = iter([0.0, 0.0, 2.0, 50.0, 102.0, 103.0])
    shown = []
    with Run(tmp_path / "run", RECIPE) as run:

        def page() -> Page:
            return Page(run.report_path.read_text(encoding="utf-8"))

        def reloads() -> list[Any]:
            return [meta["content"] for meta in page().all("meta") if meta.get("http-equiv") == "refresh"]

        def work() -> None:
            with LiveReport(run, recorder, now=lambda: next(times)) as live:
                for done, name in ((1, "<i>first</i>"), (2, "second"), (3, "third")):
                    live.progress(name, done, total=4, note="a note")
                    shown.append((reloads(), re.findall(r"at work: (.*?)\.", page().text)))
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            work()
        assert reloads() == []
        assert "at work" not in page().text
        write_report(run, ())
        assert reloads() == []
    # written at the first word, not after 48 seconds, and again after 50 times what writing took
    assert shown == [(["60"], ["<i>first</i>, 25 %, a note"])] * 2 + [(["60"], ["third, 75 %, a note"])]
    assert [stage for stage, *_ in recorder.steps] == ["<i>first</i>", "second", "third"]


def test_a_run_goes_on_where_its_page_cannot_be_written(tmp_path: Path, recorder: Any) -> None:
    with Run(tmp_path / "run", RECIPE) as run, LiveReport(run, recorder) as live:
        run.traces_path.write_text("no trace\n")
        live.progress("traces", 1, total=2)
    assert recorder.steps


def test_traces_stay_marked_as_trained_when_the_page_is_written_again(tmp_path: Path) -> None:
    traces = [trace(1), trace(3), trace(5)]
    report(tmp_path / "run", traces, traces[:1])
    again = Page(report(tmp_path / "run", []))
    assert sorted(str(one["data-kept"]) for one in again.all("details")) == ["no", "no", "yes"]


def test_the_table_of_hops_is_whole_at_80_columns() -> None:
    widest = SCORE | {"accuracy": 1.0, "interval": [0.905, 1.0], "closed": 1.0, "looped": 1.0, "n_unknown": 200}
    console = Console(width=80, file=io.StringIO())
    scores = {"student": widest | {"tokens_per_answer": 9999, "tokens_per_s": 9999, "unknown": {}}}
    print_hops(console, scores, {"student": 269_100_000})
    said = console.file.getvalue()  # type: ignore[attr-defined]
    for cell in ("student", "100 %", "90.5–100.0", "9999", "269 MB"):
        assert cell in said
    assert "…" not in said
