"""`deepdistill export`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from ..errors import UsageError
from .run_folder import export_gguf, run_of
from .shared import AsJson, Offline, Quiet, bars, tell


def export(
    path: Annotated[
        str | None, typer.Argument(help="A traces.jsonl, a .gguf file, a run folder or hf:ORG/REPO[:FILE].")
    ] = None,
    to: Annotated[
        Literal["phone", "messages", "parquet"],
        typer.Option(help="phone: a GGUF as a folder; messages (JSONL) or parquet: traces for other trainers."),
    ] = "phone",
    out: Annotated[
        Path | None, typer.Option(help="The folder or file to write. Named after the input, unless given.")
    ] = None,
    reasoning: Annotated[
        Literal["field", "think"],
        typer.Option(help="Where the reasoning of traces goes: a field of its own, or think tags in the content."),
    ] = "field",
    all_traces: Annotated[bool, typer.Option("--all", help="Export traces that are not right as well.")] = False,
    memory: Annotated[
        int | None,
        typer.Option(help="MB of memory that the model and its context may take. 2000, unless given.", min=1),
    ] = None,
    json_output: AsJson = False,
    offline: Offline = False,
    quiet: Quiet = False,
) -> None:
    """Write a folder that runs on a phone, or traces for other trainers.

    The folder has the GGUF and a page that runs it offline. Traces become rows of messages, as JSONL or Parquet.
    """
    if to != "phone":
        _export_traces(path, out, to=to, reasoning=reasoning, all_traces=all_traces, json_output=json_output)
        return
    from ..localrun.find import find_model
    from ..localrun.phone.phone import export_phone

    folder = Path(path) if path and Path(path).is_dir() else None
    model = folder or find_model(path, offline=offline)
    name = (folder or model.with_suffix("")).resolve().name
    run, taught = run_of(folder) if folder else (None, None)
    with bars(quiet) as progress:

        def make(type_: str) -> Path:
            assert run is not None
            target = run / f"student-{type_}.gguf"
            return export_gguf(run / "student", target, type_=type_, recipe=taught, report=progress, proofs=False).path

        report = export_phone(
            model,
            out or Path(f"{name}-phone"),
            memory_mb=memory,
            make=make if run and (run / "student").is_dir() else None,
            offline=offline,
            report=progress,
        )
    tell(*report.summary(), f"next: python -m http.server --directory {report.folder}/web 8000")
    if json_output:
        print(json.dumps(dataclasses.asdict(report), default=str))


def _export_traces(
    path: str | None,
    out: Path | None,
    *,
    to: Literal["messages", "parquet"],
    reasoning: Literal["field", "think"],
    all_traces: bool,
    json_output: bool,
) -> None:
    """Write traces, a run's or a file's, as rows for another trainer."""
    from ..distill.traces.exporting import export_traces

    if path is None:
        raise UsageError("which traces?", "give a traces.jsonl or a run folder", code="no-traces")
    source = Path(path) / "traces.jsonl" if Path(path).is_dir() else Path(path)
    target = out or source.with_name(f"{source.stem}-{to}.{'parquet' if to == 'parquet' else 'jsonl'}")
    n_rows = export_traces(source, target, to=to, reasoning=reasoning, include="all" if all_traces else "accepted")
    tell(f"{target}: {n_rows:,} rows")
    if json_output:
        print(json.dumps({"path": str(target), "rows": n_rows}))
