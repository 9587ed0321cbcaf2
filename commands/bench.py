"""`deepdistill bench`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from .shared import AsJson, Offline, Quiet, bars, console


def bench(
    model: Annotated[str | None, typer.Argument(help="A .gguf file, a run folder or hf:ORG/REPO[:FILE].")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Measure fewer points, in half a minute for a small model.")
    ] = False,
    threads: Annotated[int | None, typer.Option(help="CPU threads. Measured anew, unless given.", min=1)] = None,
    json_output: AsJson = False,
    offline: Offline = False,
    quiet: Quiet = False,
) -> None:
    """Measure how fast a GGUF runs here.

    It measures prefill and decoding at several depths, sequences and KV types, against the memory's bandwidth.
    """
    from ..localrun.bench import QUICK, BenchSettings, print_bench
    from ..localrun.bench import bench as run_bench
    from ..localrun.find import find_model

    path = find_model(model, offline=offline)
    with bars(quiet) as progress:
        report = run_bench(path, QUICK if quick else BenchSettings(), n_threads=threads, report=progress)
    print_bench(report, console())
    if json_output:
        print(json.dumps(report.to_json()))
