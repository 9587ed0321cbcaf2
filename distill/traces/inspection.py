"""What `inspect` looks up: a traces file, one trace of it, or a run folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...errors import ArtifactError, UsageError
from ...localrun.core.record_log import parse_line, whole_lines
from ..records import Trace
from ..run import find_run
from .store import TraceStore
from .summary import TraceSummary


def find_trace(path: Path, which: str) -> Trace:
    """Return a trace by its number from 1, by its id, or by the first 4 or more characters of it.

    Raises:
        UsageError: `code` "no-such-trace", or "ambiguous-id" if several ids begin like this.
        ArtifactError: `code` "file-unreadable" or "line-broken".
    """
    if which.isdecimal() and len(which) < 10:
        for number, trace in enumerate(TraceStore.read(path), 1):
            if number == int(which):
                return trace
    if len(which) >= 4:
        # Our lines begin with the id, so that the others need no parsing.
        lines = ((number, line) for number, line in whole_lines(path) if which.encode() in line[:200])
        ids = {
            t.id
            for t in (parse_line(Trace, line, path=path, number=number) for number, line in lines)
            if t.id.startswith(which)
        }
        if len(ids) > 1:
            names = ", ".join(sorted(ids)[:3])
            raise UsageError(
                f"{len(ids)} traces begin with {which}: {names}", "give more of the id", code="ambiguous-id"
            )
        if ids:
            return next(trace for trace in TraceStore.read(path) if trace.id in ids)
    raise UsageError(
        f"{path} has no trace {which}", "give a number from 1, or the beginning of an id", code="no-such-trace"
    )


def inspect_traces(path: Path) -> TraceSummary:
    """Return the summary of a traces file.

    Raises:
        ArtifactError: `code` "file-unreadable" or "line-broken".
    """
    return TraceSummary.of(TraceStore.read(path), path)


def inspect_run(folder: Path) -> dict[str, Any]:
    """Return a run folder's recipe, artifacts with their sizes in bytes, curation, scores and traces.

    Raises:
        ArtifactError: `code` "not-a-run", or "json-broken" if a file in it is broken.
    """
    if find_run(folder) != folder:
        raise ArtifactError(f"{folder} is not a run folder: it has no recipe.json", "name another", code="not-a-run")
    found: dict[str, Any] = {"path": str(folder)}
    for name in ("recipe", "curation", "training", "scores"):
        path = folder / f"{name}.json"
        try:
            found[name] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        except (OSError, ValueError) as error:
            raise ArtifactError(f"{path} is broken: {error}", "mend or delete it", code="json-broken") from error
    shown = (path for path in sorted(folder.iterdir()) if not path.name.startswith("."))
    found["artifacts"] = {path.name: _n_bytes(path) for path in shown}
    traces = folder / "traces.jsonl"
    found["traces"] = inspect_traces(traces).to_json() if traces.exists() else None
    return found


def _n_bytes(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
