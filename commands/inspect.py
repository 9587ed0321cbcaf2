"""`deepdistill inspect`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from .shared import AsJson, console, tell


def inspect(
    path: Annotated[Path, typer.Argument(help="A traces.jsonl, a run folder or a .gguf file.")],
    show: Annotated[
        str | None, typer.Option("--show", help="Show one trace: its number, or the beginning of its id.")
    ] = None,
    json_output: AsJson = False,
) -> None:
    """Show what a file of traces, a run or a GGUF holds.

    Of traces it shows verdicts, lengths and cost; of a run its scores; of a GGUF where it comes from.
    """
    if path.suffix == ".gguf":
        from ..quantize.provenance.inspect import inspect_gguf, summary

        of_file = inspect_gguf(path)
        tell(*summary(of_file))
        if json_output:
            print(json.dumps(of_file, default=str))
        return
    from ..distill.traces.inspection import find_trace, inspect_run, inspect_traces
    from ..distill.traces.show import print_report, print_run, print_trace

    terminal = console()
    if show is not None:
        trace = find_trace(path / "traces.jsonl" if path.is_dir() else path, show)
        print_trace(trace, terminal)
        found = dataclasses.asdict(trace)
    elif path.is_dir():
        found = inspect_run(path)
        print_run(found, terminal)
    else:
        report = inspect_traces(path)
        print_report(report, terminal)
        found = report.to_json()
    if json_output:
        print(json.dumps(found, default=str))
