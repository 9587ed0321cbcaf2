"""The files of a student compared in one table: in Markdown for the model card, in HTML for the run's report.

Their measurements are kept in `fidelity.json` beside them, so that later files join the table.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

from ...localrun.core.atomic import write_text
from .plot import Point, draw

_BEGIN, _END = "<!-- files: begin -->", "<!-- files: end -->"
# A figure's head, its part of the file's measurements, its key there, and how it is written.
_FIGURES = (
    ("mean KL", "fidelity", "kl_mean", ".4f"),
    ("99 % KL", "fidelity", "kl_p99", ".3f"),
    ("same top", "fidelity", "same_top", ".2%"),
    ("perplexity", "fidelity", "perplexity", ".4f"),
    ("accuracy", "answers", "accuracy", ".1%"),
    ("closed", "answers", "closed", ".1%"),
    ("loops", "answers", "loops", ".1%"),
    ("lost", "paired", "lost", "d"),
    ("gained", "paired", "gained", "d"),
    ("p", "paired", "p_value", ".3f"),
)
_HEADS = ("file", "MB", "bits a weight", *(head for head, *_ in _FIGURES))


@dataclass(frozen=True)
class ComparedFile:
    """One file as `fidelity.json` has it, in JSON values; `fidelity`, `answers` and `paired` may be missing.

    `texts` is the hash of the traces that the fidelity is measured on; `asked` names the problems of the answers.
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

    def comparable(self, others: Sequence[ComparedFile]) -> ComparedFile:
        """Return it without the figures that come from other traces or other problems than the other files'."""
        found = self
        if any(other.fidelity and other.texts != self.texts for other in others):
            found = replace(found, fidelity=None, texts="")
        if any(other.answers and other.asked != self.asked for other in others):
            found = replace(found, answers=None, paired=None, asked="")
        return found

    def cells(self) -> list[str]:
        """Return its row of the table as text, with a dash where nothing was measured."""
        cells = [self.name, f"{self.n_bytes / 1e6:.1f}", f"{self.bits_per_weight:.2f}"]
        for _, part, key, form in _FIGURES:
            value = (getattr(self, part) or {}).get(key)
            cells.append("–" if value is None else format(value, form).replace("%", " %"))
        return cells


def keep_files(folder: Path, files: Sequence[ComparedFile], source: str) -> list[ComparedFile]:
    """Add files to a folder's fidelity.json and return all files there, the largest first.

    Files of another source, and figures from other traces or other problems, cannot be compared and are dropped.

    Raises:
        ArtifactError: `code` "write-failed".
    """
    path = folder / "fidelity.json"
    kept: dict[str, ComparedFile] = {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["source"] == source:
            kept = {one["name"]: ComparedFile(**one).comparable(files) for one in found["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        pass  # there is none yet, or another version wrote it
    kept |= {one.name: one for one in files}
    ordered = sorted(kept.values(), key=lambda one: -one.n_bytes)
    write_text(path, json.dumps({"source": source, "files": [vars(one) for one in ordered]}, indent=1) + "\n")
    return ordered


def markdown(files: Sequence[ComparedFile]) -> str:
    """Return the table for a model card."""
    lines = [_HEADS, ("---",) + ("---:",) * (len(_HEADS) - 1), *(one.cells() for one in files)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def html(files: Sequence[ComparedFile]) -> str:
    """Return the table and the plot for the report."""

    def cell(tag: str, text: str, i: int) -> str:
        kind = ' class="n"' if i else ""
        return f"<{tag}{kind}>{escape(text)}</{tag}>"

    head = "".join(cell("th", name, i) for i, name in enumerate(_HEADS))
    rows = ("".join(cell("td", text, i) for i, text in enumerate(one.cells())) for one in files)
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    caption = "<caption>Each file against the unquantized model, on held-out traces and test problems.</caption>"
    table = f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    region = f'<div class="wide" tabindex="0" role="region" aria-labelledby="files">{table}</div>'
    return f'<h2 id="files">Files</h2>{region}<figure>{plot(files)}</figure>'


def plot(files: Sequence[ComparedFile]) -> str:
    """Return the plot of the files whose fidelity was measured, as SVG."""
    return draw([Point(one.name, one.n_bytes, one.fidelity["kl_mean"], one.is_ours) for one in files if one.fidelity])


def update_report(folder: Path, files: Sequence[ComparedFile]) -> None:
    """Put the files into a run's report.html, between its marks; a later report keeps that part.

    Raises:
        ArtifactError: `code` "write-failed".
    """
    part = f'{_BEGIN}\n<section aria-labelledby="files">{html(files)}</section>\n{_END}'
    path = folder / "report.html"
    try:
        page = path.read_text(encoding="utf-8")
    except OSError:
        return  # no run, no report
    begin, end = page.find(_BEGIN), page.find(_END)
    if not 0 <= begin < end:
        return  # an older version wrote it
    page = page[:begin] + part + page[end + len(_END) :]
    write_text(path, page)
