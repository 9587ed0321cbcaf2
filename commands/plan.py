"""`deepdistill plan`."""

from __future__ import annotations

import json
from typing import Annotated, Literal

import typer

from .shared import AsJson, console


def plan(
    teacher: Annotated[
        str,
        typer.Argument(help="A known model (a wrong name lists them), a config.json, or a folder with one."),
    ] = "DeepSeek-R1",
    n_traces: Annotated[int, typer.Option(help="Traces to make.", min=1)] = 10_000,
    tokens: Annotated[int, typer.Option(help="Tokens per trace on average, thinking and answer.", min=1)] = 4_000,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens per prompt on average.", min=0)] = 200,
    gpu: Annotated[str, typer.Option(help="The GPU: H200, H100, A100, RTX4090, …; a wrong name lists them.")] = "H200",
    n_gpus: Annotated[
        int | None, typer.Option(help="GPUs of one deployment. The fewest that hold the model, unless given.", min=1)
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Number format of the weights. The publisher's, unless given.")
    ] = None,
    kv_dtype: Annotated[Literal["bf16", "fp8"], typer.Option(help="Number format of the KV cache.")] = "bf16",
    concurrency: Annotated[int, typer.Option(help="Sequences that are generated at once.", min=1)] = 256,
    tokens_per_s: Annotated[
        float | None,
        typer.Option(
            help="Tokens per second of the deployment, measured. An upper bound is used, unless given.", min=0.01
        ),
    ] = None,
    gpu_hour: Annotated[float | None, typer.Option(help="Dollars per GPU and hour.", min=0)] = None,
    price: Annotated[
        str | None, typer.Option(help="IN,OUT: what an endpoint costs instead, in dollars per million tokens.")
    ] = None,
    json_output: AsJson = False,
) -> None:
    """Compute what a full-size teacher takes: GPUs, hours and money.

    It takes memory and bandwidth into account; docs/planning.md has the formulas.
    """
    from ..distill.planning.plan import PlanSettings
    from ..distill.planning.plan import plan as make_plan
    from ..distill.planning.text import plan_json, print_plan
    from ..distill.recipe.gathering import Price, read_price

    made = make_plan(
        PlanSettings(
            teacher,
            n_traces,
            tokens,
            prompt_tokens,
            gpu,
            n_gpus,
            dtype,  # type: ignore[arg-type]  # PlanSettings checks it, and says which there are
            kv_dtype,
            concurrency,
            tokens_per_s,
            gpu_hour,
            Price(*read_price(price)) if price else None,
        )
    )
    print_plan(made, console())
    if json_output:
        print(json.dumps(plan_json(made)))
