"""Traces in a terminal: a summary with its histogram, one trace to read, a run folder in brief."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ...localrun.chat.screen import Screen, Thought
from ...localrun.core.printable import facts_table, printable
from ...localrun.core.text import format_bytes, listed
from ..records import Trace
from .summary import TraceSummary, quantile

_STYLES = {"right": "green", "wrong": "red", "unknown": "yellow"}
_BAR_WIDTH = 40
_EIGHTHS = " ▏▎▍▌▋▊▉█"


def print_report(summary: TraceSummary, console: Console) -> None:
    """Print the summary of a traces file."""
    size = format_bytes(summary.n_bytes)
    console.print(Text.assemble((f"{summary.n_traces:,} traces", "bold"), f"  {printable(str(summary.path))}  {size}"))
    facts: list[tuple[str, str | Text]] = [("verdicts", _verdicts(summary.verdicts))]
    facts.append(("by", _counts(summary.verdict_by)))
    facts += [("", f"{n:,} unknown: {reason}") for reason, n in summary.reasons.most_common(5)]
    facts.append(("ended by", _counts(summary.finish_reasons)))
    facts.append(("teacher", _counts(summary.teachers, most=5)))
    written = f"{summary.prompt_tokens:,} prompt, {summary.completion_tokens:,} completion"
    facts.append(("tokens", f"{written}, {summary.reasoning_tokens:,} of them reasoning"))
    facts.append(("cost", "not recorded" if summary.cost_usd is None else f"${summary.cost_usd:,.2f}"))
    if summary.n_logprobs:
        facts.append(("log-probabilities", f"for {summary.n_logprobs:,} traces"))
    console.print(facts_table(facts, ""), highlight=False)
    if len(summary.sources) > 1 or "" not in summary.sources:
        console.print(_sources(summary.verdicts_by_source()))
    _print_histogram(summary, console)
    _print_examples(summary, console)


def print_trace(trace: Trace, console: Console) -> None:
    """Print one trace to read: the question, the thinking dimmed, the answer with its Markdown rendered."""
    by = "" if trace.verdict_by == "none" else f" by {trace.verdict_by}"
    share = "" if trace.agreement is None else f" ({trace.agreement:.0%})"
    head = f"{trace.id}  {trace.teacher.name}  {trace.usage.completion:,} tokens  ended by {trace.finish_reason}  "
    console.print(Text.assemble((printable(head), "dim"), (trace.verdict, _STYLES[trace.verdict]), by, share))
    for message in trace.messages:
        console.print(Text(f"\n{message['role']}", "bold"))
        console.print(Text(printable(message["content"])))
    console.print(Text(f"\n{trace.teacher.name}", "bold"))
    screen = Screen(console)
    if trace.reasoning_content:
        screen.show_again(Thought(printable(trace.reasoning_content), trace.usage.reasoning, None))
        screen.end()
        console.print()
    screen.show_text(trace.content)
    if trace.answer is not None:
        console.print(Text.assemble(("\nanswer ", "dim"), (printable(trace.answer), _STYLES[trace.verdict])))
    if trace.reason:
        console.print(Text.assemble(("\nunknown because ", "dim"), printable(trace.reason)))


def print_run(run: Mapping[str, Any], console: Console) -> None:
    """Print a run folder as `inspect_run` returns it."""
    recipe = run["recipe"]
    console.print(Text(printable(run["path"]), "bold"))
    facts = [(name, str(recipe[name])) for name in ("problems", "teacher", "student", "seed") if name in recipe]
    facts.append(("artifacts", ", ".join(f"{name} {format_bytes(size)}" for name, size in run["artifacts"].items())))
    if traces := run["traces"]:
        facts.append(("traces", f"{traces['traces']:,}: " + _counts(traces["verdicts"])))
    if curation := run["curation"]:
        facts.append(("curated", f"{curation['kept']:,} kept of {curation['traces']:,}"))
    facts += [(f"score of {hop}", _score(score)) for hop, score in (run["scores"] or {}).items()]
    console.print(facts_table(facts, ""), highlight=False)


def _score(score: Any) -> str:
    if isinstance(score, dict) and isinstance(score.get("accuracy"), int | float):
        unknown = f", {score['n_unknown']} unknown" if score.get("n_unknown") else ""
        return f"{score['accuracy']:.1%} of {score.get('n', '?')}{unknown}"
    return json.dumps(score)


def _print_histogram(summary: TraceSummary, console: Console) -> None:
    bins, lengths = summary.histogram(), summary.lengths
    if not bins:
        return
    most, digits = max(n for *_, n in bins), len(f"{bins[-1][1]:,}")
    console.print(
        f"\nlength in {summary.unit}: median {quantile(lengths, 0.5):,}, 90 % within {quantile(lengths, 0.9):,}",
        highlight=False,
    )
    for low, high, n in bins:
        eighths = round(8 * _BAR_WIDTH * n / most) or (1 if n else 0)
        bar = "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()
        console.print(Text.assemble(f"{low:>{digits},} – {high:>{digits},}  ", (bar, "cyan"), (f" {n:,}", "dim")))


def _print_examples(summary: TraceSummary, console: Console) -> None:
    titles = {"longest": "longest", "wrong": "wrong, the longest", "cut": "looped or cut off, the longest"}
    for kind, examples in summary.examples.items():
        console.print(f"\n{titles[kind]}", highlight=False)
        for one in examples:
            line = (
                f"  {one.number:>7,}  {one.id[:8]}  {one.length:>7,}  {one.finish_reason:<6}  {printable(one.question)}"
            )
            console.print(Text(line), no_wrap=True, overflow="ellipsis")


def _sources(sources: Mapping[str, Counter[str]]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("source")
    for verdict in _STYLES:
        table.add_column(verdict, justify="right", style=_STYLES[verdict])
    for source, verdicts in sorted(sources.items(), key=lambda item: -item[1].total()):
        table.add_row(Text(printable(source)), *(f"{verdicts[verdict]:,}" for verdict in _STYLES))
    return table


def _verdicts(verdicts: Mapping[str, int]) -> Text:
    parts = [Text(f"{verdicts[name]:,} {name}", style) for name, style in _STYLES.items() if verdicts.get(name)]
    return Text(", ").join(parts)


def _counts(counts: Mapping[str, int], most: int = 8) -> str:
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    return listed((f"{n:,} {name}" for name, n in ordered), most=most)
