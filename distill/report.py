"""What a run came to: a page with the scores, what was kept and a few traces to read; and a table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jinja2
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from .run import Run, write_text
from .traces import Trace

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{{ recipe.student }} taught {{ recipe.problems }}</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a }
table { border-collapse: collapse; width: 100% }
th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid #ddd }
td.n { text-align: right; font-variant-numeric: tabular-nums } pre { white-space: pre-wrap; margin: .2rem 0 }
.bar { background: #3b6; height: .6rem; display: inline-block } .thinking { color: #777 } h2 { margin-top: 2rem }
@media (prefers-color-scheme: dark) { body { background: #161616; color: #ddd } th, td { border-color: #333 } }
</style>
<h1>{{ recipe.student }}, taught by {{ recipe.teacher }}</h1>
<p><code>{{ recipe.problems }}</code></p>
<h2>Scores on held-out problems</h2>
{% if scores %}<table><tr><th>hop<th>accuracy<th><th>95 % interval<th>closed<th>looped<th>tokens an answer</tr>
{% for hop, s in scores.items() %}<tr><td>{{ hop }}<td class="n">{{ "%.1f"|format(100 * s.accuracy) }} % of {{ s.n }}
<td><span class="bar" style="width: {{ "%.2f"|format(8 * s.accuracy) }}rem"></span>
<td class="n">{{ "%.1f"|format(100 * s.interval[0]) }} – {{ "%.1f"|format(100 * s.interval[1]) }} %
<td class="n">{{ "–" if s.closed is none else "%.1f %%"|format(100 * s.closed) }}
<td class="n">{{ "%.1f"|format(100 * s.looped) }} %<td class="n">{{ "%.0f"|format(s.tokens_per_answer) }}</tr>
{% endfor %}</table>{% else %}<p>Not scored yet.</p>{% endif %}
<h2>Traces</h2>
<p>{{ curation.kept }} of {{ curation.traces }} trained.</p>
<table>{% for name, count in curation.dropped.items() if count %}
<tr><td>{{ name }}<td class="n">{{ count }}<td>{{ curation.why.get(name, "") }}</tr>{% endfor %}</table>
{% if training %}<h2>Training</h2>
<p>{{ training.steps }} steps, {{ training.tokens }} tokens in {{ training.minutes }} minutes
({{ "%.0f"|format(training.tokens_per_s) }} tokens/s), final loss {{ training.final_loss }}.</p>{% endif %}
<h2>A few traces</h2>
{% for t in traces %}<pre><b>{{ t.messages[-1].content }}</b>
<span class="thinking">{{ t.reasoning_content }}</span>
{{ t.content }}</pre><hr>{% endfor %}
<h2>Recipe</h2>
<table>{% for key, value in recipe.items() %}<tr><td>{{ key }}<td><code>{{ value }}</code></tr>{% endfor %}</table>
</html>
"""


def write_report(run: Run, traces: Sequence[Trace]) -> None:
    """Write report.html from the run's artifacts."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    values: dict[str, Any] = {name: run.load(f"{name}.json") for name in ("recipe", "scores", "curation", "training")}
    write_text(run.report_path, environment.from_string(_PAGE).render(**values, traces=traces[:5]))


def print_hops(console: Console, scores: dict[str, dict[str, Any]], sizes: dict[str, int]) -> None:
    """Print one table of the hops: accuracy with its interval, closure, loops, tokens, size."""
    heads = ["", "accuracy", "95 % interval", "closed", "looped", "tokens", "tokens/s"] + (["size"] if sizes else [])
    table = Table(*heads, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in table.columns[1:]:
        column.justify = "right"
    for hop, score in scores.items():
        closed = "–" if score["closed"] is None else f"{100 * score['closed']:.1f} %"
        low, high = score["interval"]
        cells = [
            hop,
            f"{100 * score['accuracy']:.1f} %",
            f"{100 * low:.1f}–{100 * high:.1f}",
            closed,
            f"{100 * score['looped']:.1f} %",
            f"{score['tokens_per_answer']:.0f}",
            f"{score['tokens_per_s']:.0f}",
        ]
        table.add_row(*cells, *([f"{sizes[hop] / 1e6:.1f} MB"] if sizes else []))
    console.print(table)
