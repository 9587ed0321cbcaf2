"""The results of a run: a page for the browser, and tables for the terminal.

The page needs no network, and can be read without scripts. What a teacher wrote may be hostile, so all text is escaped,
and a content security policy allows only the page's own script.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import escape
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ...localrun.core.atomic import write_text
from ...localrun.core.record_log import read_records
from ...localrun.core.settings import flat
from ...localrun.core.text import format_bytes, shorten
from ..curation.filters import question_of
from ..recipe.upgrade import upgraded
from ..records import CURVE_FILE, CurvePoint, Trace
from ..run import Run
from ..traces.store import TraceStore
from ..traces.summary import JUDGED_AS, TraceSummary, judged_as
from .charts import Chart, LineChart, curve, histogram, line, over_time
from .evaluate import unclear
from .pairs import Answer, Pair, counts_of, pair_answers, read_answers, some_of

_TEMPLATE = Path(__file__).with_name("report.html.jinja")
_N_BYTES = {"question": 2000, "reasoning": 6000, "content": 3000}  # at most, of each text in the page
_N_PAIRS, _N_BYTES_OF_ANSWER = 60, 1200
_FILES = re.compile(r"<!-- files: begin -->.*?<!-- files: end -->", re.DOTALL)
_KEPT = re.compile(r'data-kept="yes" data-id="([^"]*)">')
_VERIFIED_BY = ("held_out", "wrong", "unknown")  # the filters that come before a trace counts as verified


@dataclass(frozen=True)
class Sides:
    """The answers of two hops to the same problems: how many of each state, and some of them to read."""

    id: str
    title: str
    hops: tuple[str, str]
    counts: dict[str, int]
    pairs: list[dict[str, Any]]


@dataclass(frozen=True)
class FunnelRow:
    """One row of the funnel: how many traces a filter removed, and how many were left."""

    name: str
    left: int
    removed: int | None = None
    why: str = ""
    example: dict[str, str] | None = None


def write_report(run: Run, kept: Iterable[Trace] | None = None, *, status: str = "") -> None:
    """Write report.html from the run's artifacts.

    kept: the traces that trained; as the page before has it, unless given.
    status: what the run does now. With it the page says so and reloads itself each minute.
    """
    artifacts = {name: run.load(f"{name}.json") for name in ("recipe", "scores", "curation", "training")}
    recipe = {".".join(path): value for path, value in flat(upgraded(artifacts["recipe"] or {}))}
    is_elsewhere = recipe.get("traces.file") and not run.traces_path.exists()
    traces_path = Path(recipe["traces.file"]) if is_elsewhere else run.traces_path
    summary = TraceSummary.of(TraceStore.read(traces_path) if traces_path.exists() else ())
    kept_ids = _marked(run.report_path) if kept is None else {trace.id for trace in kept}
    shown = [_show(trace, kept_ids) for trace in summary.sample()]
    columns = [name for name in JUDGED_AS if any(counts[name] for counts in summary.sources.values())]
    rounds = [run.load(f"rounds/{i}/round.json") or {} for i in range(1, 1 + int(recipe.get("on_policy.rounds") or 0))]
    points = list(read_records(run.folder / CURVE_FILE, CurvePoint, missing_ok=True, skip_broken=True))
    values = artifacts | {"rounds": [one for one in rounds if "rows" in one]}
    values |= {"curves": _curves(points, artifacts["training"] or {}), **_answers(run, artifacts["scores"] or {})}
    values |= {"status": status, "now": f"{datetime.now():%H:%M}"}
    values |= {"recipe": recipe, "summary": summary, "shown": shown, "columns": columns, "charts": _charts(summary)}
    page = _template().render(**values, steps=list(funnel(artifacts["curation"], summary)))
    write_text(run.report_path, _printable(_with_files(page, run.report_path)))


def _curves(points: list[CurvePoint], training: dict[str, Any]) -> dict[str, LineChart]:
    """Return the charts of the training by what they show."""
    steps = training.get("curve") or []  # of GRPO
    found = {
        "Loss": curve(points, "loss"),
        "Held-out tokens that are the student’s first choice": curve(points, "validation_accuracy"),
        "Right answers": line([one["step"] for one in steps], [one["right"] for one in steps], is_share=True),
    }
    return {name: chart for name, chart in found.items() if chart}


def _answers(run: Run, scores: dict[str, Any]) -> dict[str, Any]:
    """Return the share of unknown verdicts of each hop, the headline, and the answers of two hops side by side."""
    answers = {hop: read_answers(run.folder / "answers" / f"{hop}.jsonl") for hop in ("base", "student", "gguf")}
    taught = pair_answers(answers["base"], answers["student"])
    quantized = pair_answers(answers["student"], answers["gguf"])
    changed = [pair for pair in quantized if pair.before.get("verdict") != pair.after.get("verdict")]
    sides = [
        Sides("taught", "Base and student side by side", ("base", "student"), counts_of(taught), _pairs(taught)),
        Sides("quantized", "What quantizing changed", ("student", "gguf"), counts_of(quantized), _pairs(changed)),
    ]
    return {
        "unknown": {hop: score["n_unknown"] / score["n"] for hop, score in scores.items() if "n_unknown" in score},
        "headline": _headline(scores, counts_of(taught)),
        "unclear": {hop: text for hop, score in scores.items() if (text := unclear(score))},
        "sides": [one for one in sides if sum(one.counts.values())],
    }


def _headline(scores: dict[str, Any], counts: dict[str, int]) -> str:
    """Return what came of the run, in a sentence."""
    if not {"base", "student"} <= scores.keys():
        return ""
    base, student = scores["base"], scores["student"]
    told = f"{100 * student['accuracy']:.1f} % of {student['n']:,} problems, the base {100 * base['accuracy']:.1f} %"
    if not any(counts.values()):
        return f"The student solves {told}."
    n, least = counts["gained"] + counts["lost"], min(counts["gained"], counts["lost"])
    chance = min(1.0, 2 * sum(math.comb(n, i) for i in range(least + 1)) / 2**n)  # the sign test on what changed
    if chance > 0.05:
        return f"The difference may be chance: the student solves {told}."
    which = "better" if counts["gained"] > counts["lost"] else "worse"
    return f"The student is {which} than its base: it solves {told}."


def _pairs(pairs: list[Pair]) -> list[dict[str, Any]]:
    """Return some pairs as the page shows them, their texts shortened."""
    shown = []
    for pair in some_of(pairs, _N_PAIRS):
        question = str(pair.after.get("question") or "")
        sides = [_side(answer) for answer in (pair.before, pair.after)]
        texts = {"question": _cut(question, _N_BYTES_OF_ANSWER), "line": shorten(question, 160)}
        shown.append(texts | {"state": pair.state, "expected": pair.after.get("expected"), "sides": sides})
    return shown


def _side(answer: Answer) -> dict[str, Any]:
    texts = {name: str(answer.get(name) or "").strip() for name in ("reasoning_content", "content")}
    shown = {name: _cut(text, _N_BYTES_OF_ANSWER) for name, text in texts.items()}
    return shown | {"verdict": answer.get("verdict"), "answer": shorten(str(answer.get("answer") or "–"), 24)}


def _charts(summary: TraceSummary) -> dict[str, Chart | None]:
    """Return the charts of the traces: their lengths, their costs if a price is known, and the teacher's speed.

    The speed is that of all requests together over the time worked, if the traces have their end times; otherwise it
    is that of each request, in the order of the file.
    """
    tokens = {verdict: np.asarray(values) for verdict, values in summary.tokens.items()}
    usd = {verdict: np.asarray(values) for verdict, values in summary.usd.items()}
    speed = over_time(np.asarray(summary.end_times), np.asarray(summary.end_tokens))
    return {
        "lengths": histogram(tokens, "tokens"),
        "costs": histogram(usd, "$"),
        "speed": speed or over_time(None, np.asarray(summary.speeds)),
    }


def _marked(page_path: Path) -> set[str] | None:
    """Return the traces that a page shows as trained; None without a page, or without such traces."""
    page = page_path.read_text(encoding="utf-8") if page_path.is_file() else ""
    return {html.unescape(found) for found in _KEPT.findall(page)} or None


def _with_files(page: str, before: Path) -> str:
    """Return the page with the table of GGUFs that `quantize` has put into the report that the page replaces."""
    found = _FILES.search(before.read_text(encoding="utf-8")) if before.is_file() else None
    return _FILES.sub(lambda _: found[0], page, count=1) if found else page


def funnel(curation: dict[str, Any] | None, summary: TraceSummary) -> Iterator[FunnelRow]:
    """Yield how many traces were left, filter by filter."""
    yield FunnelRow("problems asked", summary.n_problems)
    left = curation["traces"] if curation else summary.n_traces
    yield FunnelRow("traces", left)
    if not curation:
        return
    dropped = {name: count for name, count in curation["dropped"].items() if count}
    early = [name for name in dropped if name in _VERIFIED_BY]
    for name in early + [name for name in dropped if name not in early]:
        if early and name not in early:
            yield FunnelRow("verified", left)
            early = []
        left -= dropped[name]
        example = curation.get("examples", {}).get(name)
        yield FunnelRow(name.replace("_", " "), left, dropped[name], curation["why"].get(name, ""), example)
    yield FunnelRow("training rows", curation["kept"])


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["sha256"] = lambda text: base64.b64encode(hashlib.sha256(str(text).encode()).digest()).decode()
    environment.filters["compact"] = lambda value: value if isinstance(value, str) else json.dumps(value)
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))


def _show(trace: Trace, kept_ids: set[str] | None) -> dict[str, Any]:
    """Return a trace as the page shows it, its texts shortened."""
    question = question_of(trace)
    texts = {"question": question, "reasoning": trace.reasoning_content or "", "content": trace.content}
    is_kept = None if kept_ids is None else trace.id in kept_ids
    shown = {"trace": trace, "judged": judged_as(trace), "line": shorten(question, 160), "is_kept": is_kept}
    return shown | {name: _cut(text, _N_BYTES[name]) for name, text in texts.items()}


def _cut(text: str, n_bytes: int) -> str:
    """Return the text, without its middle if it would take more than n_bytes in the page."""
    text = _printable(text)
    head = text[:n_bytes]
    size = len(str(escape(head)).encode())
    if len(text) == len(head) and size <= n_bytes:
        return text
    n = len(head) * n_bytes // max(size, n_bytes) // 2  # characters to keep at each end
    return f"{text[:n]}\n\n[… {len(text) - 2 * n:,} characters left out …]\n\n{text[len(text) - n :]}"


def _printable(text: str) -> str:
    """Return the text without characters that UTF-8 or HTML cannot have: half a surrogate pair, a null byte."""
    return text.encode("utf-8", "replace").decode().replace("\0", "�")


def print_curation(console: Console, record: dict[str, Any]) -> None:
    """Print how many traces each filter removed and how many were left, with an example of each."""
    table = Table("", "removed", "left", "for example", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.columns[1].justify = table.columns[2].justify = "right"
    for column in table.columns:
        column.no_wrap = True
    table.columns[3].overflow, table.columns[3].max_width = "ellipsis", max(20, console.width - 36)
    left = record["traces"]
    table.add_row("traces", "", f"{left:,}")
    for name, removed in record["dropped"].items():
        left -= removed
        example = record.get("examples", {}).get(name, {})
        text = f"{example['id'][:8]} {example['excerpt']}" if example else ""
        table.add_row(name.replace("_", " "), f"{removed:,}", f"{left:,}", Text(text))
    table.add_row("training rows", "", f"{record['kept']:,}")
    console.print(table)


def print_hops(console: Console, scores: dict[str, dict[str, Any]], sizes: dict[str, int]) -> None:
    """Print a table of the hops: accuracy with its interval, unknown answers, closed thinking, loops, tokens, size."""
    heads = ["", "accuracy", "95 %\ninterval", "unknown", "closed", "looped", "tokens", "tokens\n/s"]  # 80 columns wide
    table = Table(*heads, *(["size"] if sizes else []), box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for hop, score in scores.items():
        low, high = score["interval"]
        cells = [
            hop,
            _percent(score["accuracy"]),
            f"{100 * low:.1f}–{100 * high:.1f}",
            _percent(score["n_unknown"] / score["n"] if "n_unknown" in score else None),
            _percent(score["closed"]),
            _percent(score["looped"]),
            f"{score['tokens_per_answer']:.0f}",
            f"{score['tokens_per_s']:.0f}",
        ]
        table.add_row(*cells, *([format_bytes(sizes[hop])] if sizes else []))
    console.print(table)
    for hop, score in scores.items():
        if text := unclear(score):
            console.print(Text(f"{hop}: {text}", "bold"))


def _percent(share: float | None) -> str:
    """Return a share in at most six characters."""
    return "–" if share is None else "100 %" if share == 1 else f"{100 * share:.1f} %"
