"""The files of a student side by side: one table, in Markdown for the model card and in HTML for the run's report.

What was measured of each file is kept in `fidelity.json` beside them, so that a later file joins the table.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

from ...errors import ArtifactError
from .plot import Point, draw

_BEGIN, _END = "<!-- files: begin -->", "<!-- files: end -->"
_HEADS = ("file", "MB", "bits a weight", "mean KL", "99 % KL", "same top", "perplexity", "accuracy", "closed", "loops",
          "lost / gained", "p")  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One file: JSON values as they stand in `fidelity.json`. `fidelity`, `answers`, `paired` may be missing.

    `texts` is the hash of the traces that the fidelity is measured on, `asked` which problems the answers are to.
    """

    name: str
    n_bytes: int
    bits_per_weight: float
    is_ours: bool
    fidelity: Mapping[str, Any] | None = None
    answers: Mapping[str, Any] | None = None
    paired: Mapping[str, Any] | None = None
    texts: str = ""
    asked: str = ""

    def comparable(self, others: Sequence[Row]) -> Row:
        """Return the row without figures of other traces, or of other problems, than those of other rows."""
        row = self
        if any(one.fidelity and one.texts != self.texts for one in others):
            row = replace(row, fidelity=None, texts="")
        if any(one.answers and one.asked != self.asked for one in others):
            row = replace(row, answers=None, paired=None, asked="")
        return row

    def cells(self) -> list[str]:
        """Return the row's cells as text; a dash where nothing was measured."""
        kl, said, flips = self.fidelity or {}, self.answers or {}, self.paired or {}

        def cell(values: Mapping[str, Any], key: str, form: str, factor: float = 1) -> str:
            value = values.get(key)
            return "–" if value is None else form.format(factor * value)

        return [
            self.name,
            f"{self.n_bytes / 1e6:.1f}",
            f"{self.bits_per_weight:.2f}",
            cell(kl, "kl_mean", "{:.4f}"),
            cell(kl, "kl_p99", "{:.3f}"),
            cell(kl, "same_top", "{:.2f} %", 100),
            cell(kl, "perplexity", "{:.4f}"),
            cell(said, "accuracy", "{:.1f} %", 100),
            cell(said, "closed", "{:.1f} %", 100),
            cell(said, "loops", "{:.1f} %", 100),
            f"{flips['lost']} / {flips['gained']}" if flips else "–",
            cell(flips, "p_value", "{:.3f}"),
        ]


def keep_rows(folder: Path, rows: Sequence[Row], source: str) -> list[Row]:
    """Add rows to a folder's fidelity.json and return all of it; what cannot be compared with them is dropped.

    That is rows of another source's files, and figures from other traces or other problems.

    Raises:
        ArtifactError: it cannot be written.
    """
    path = folder / "fidelity.json"
    kept: dict[str, Row] = {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["source"] == source:
            kept = {row["name"]: Row(**row).comparable(rows) for row in found["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        pass  # none yet, or of an older version: it is measured again
    kept |= {row.name: row for row in rows}
    ordered = sorted(kept.values(), key=lambda row: -row.n_bytes)
    _write(path, json.dumps({"source": source, "files": [vars(row) for row in ordered]}, indent=1) + "\n")
    return ordered


def markdown(rows: Sequence[Row]) -> str:
    """Return the table for a model card."""
    lines = [_HEADS, ("---",) + ("---:",) * (len(_HEADS) - 1), *(row.cells() for row in rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def html(rows: Sequence[Row]) -> str:
    """Return the table and the plot for the report."""

    def cell(tag: str, text: str, i: int) -> str:
        kind = ' class="n"' if i else ""
        return f"<{tag}{kind}>{escape(text)}</{tag}>"

    head = "".join(cell("th", name, i) for i, name in enumerate(_HEADS))
    body = "".join("<tr>" + "".join(cell("td", one, i) for i, one in enumerate(row.cells())) + "</tr>" for row in rows)
    caption = "<caption>Each file against the unquantized model, on held-out traces and test problems.</caption>"
    table = f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    region = f'<div class="wide" tabindex="0" role="region" aria-labelledby="files">{table}</div>'
    return f'<h2 id="files">Files</h2>{region}<figure>{plot(rows)}</figure>'


def plot(rows: Sequence[Row]) -> str:
    """Return the plot of what was measured, as SVG."""
    return draw([Point(row.name, row.n_bytes, row.fidelity["kl_mean"], row.is_ours) for row in rows if row.fidelity])


def update_report(folder: Path, rows: Sequence[Row]) -> None:
    """Put the files into a run's report.html, between its marks, which a later report takes over.

    Raises:
        ArtifactError: it cannot be written.
    """
    part = f'{_BEGIN}\n<section aria-labelledby="files">{html(rows)}</section>\n{_END}'
    path = folder / "report.html"
    try:
        page = path.read_text(encoding="utf-8")
    except OSError:
        return  # no run, no report
    begin, end = page.find(_BEGIN), page.find(_END)
    if not 0 <= begin < end:
        return  # of an older version
    page = page[:begin] + part + page[end + len(_END) :]
    _write(path, page)


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise ArtifactError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
