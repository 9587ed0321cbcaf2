"""A plan as people and programs read it: a page of figures, and one JSON object."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ...localrun.core.printable import facts_table
from ...localrun.core.text import format_bytes
from .layouts import MOST_GPUS, USED_SHARE, GpuLayout
from .plan import ServingPlan

if TYPE_CHECKING:
    from rich.console import Console


def plan_json(plan: ServingPlan) -> dict[str, Any]:
    """Return the plan as plain values."""
    record = dataclasses.asdict(plan)
    layouts = [*plan.layouts, *plan.elsewhere.values()]
    for values, layout in zip([*record["layouts"], *record["elsewhere"].values()], layouts, strict=True):
        if layout:
            values |= {"name": layout.name, "n_gpus": layout.n_gpus}
    record["counts"] |= {"total": plan.counts.total, "active": plan.counts.active}
    return record


def print_plan(plan: ServingPlan, console: Console) -> None:
    """Print the plan, readable at 80 columns and without colour."""
    from rich.table import Table
    from rich.text import Text

    facts = facts_table(_facts(plan))
    console.print(Text(plan.model, style="bold"), Text(plan.source, style="dim"), facts, "", sep="\n")

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for title in ("GPU", "GPUs", "parallelism", "weights each", "sequences", "tokens/s"):
        table.add_column(title, justify="left" if title in ("GPU", "parallelism") else "right", no_wrap=True)
    for layout in plan.layouts:
        table.add_row(*_cells(layout), style="bold")
    for name, other in plan.elsewhere.items():
        if name != plan.gpu.name:
            table.add_row(*(_cells(other) if other else (name, f"more than {MOST_GPUS}", "", "", "", "")))
    console.print(table)
    for line in (_KEY, *(f"note: {note}" for note in plan.notes)):
        console.print(Text(line, style="dim" if line is _KEY else ""))


_KEY = (
    f"sequences: how many of this length fit beside the weights, in {USED_SHARE:.0%} of the memory. tokens/s: the most "
    "that the memory's bandwidth allows; compute, communication and prompts cost more. Measure yours and give it with "
    "--tokens-per-s. How each figure is computed: docs/planning.md."
)


def _facts(plan: ServingPlan) -> Iterator[tuple[str, str]]:
    shape, settings, layout = plan.shape, plan.settings, plan.layouts[0]
    yield "parameters", f"{plan.counts.total / 1e9:.1f} B, {plan.counts.active / 1e9:.1f} B active a token"
    if experts := shape.experts:
        yield (
            "experts",
            f"{experts.n_active} of {experts.n} active a token, in {experts.n_layers} of {shape.n_layers} layers",
        )
    yield "weights", ", ".join(f"{kind} {format_bytes(size)}" for kind, size in plan.weight_bytes.items())
    cache, plain = plan.load.cache_bytes, plan.plain_cache_bytes
    kind = "latent" if shape.latent else "grouped-query" if shape.n_kv_heads < shape.n_heads else "multi-head"
    plain_text = f"; plain multi-head attention would take {plain / cache:.1f} times that" if plain > cache else ""
    yield "KV cache", f"{cache / 1e3:.1f} kB a token in {settings.kv_dtype}, {kind} attention{plain_text}"
    yield "planned", f"{plan.dtype} on {layout.n_gpus} × {plan.gpu.name}, {layout.name}"
    stated = f"at most, a bound: {layout.n_running} sequences at once" if plan.is_bound else "as you measured"
    yield "throughput", f"{plan.tokens_per_s:,.0f} tokens/s {stated}"
    least = "at least " if plan.is_bound else ""
    what = f"{settings.traces:,} traces of {settings.tokens:,} tokens"
    yield "time", f"{least}{plan.hours:,.1f} h for {what}"
    if plan.usd_rented is not None:
        yield "rented", f"{least}${plan.usd_rented:,.2f}: {layout.n_gpus} GPUs at ${settings.gpu_hour:g} an hour"
    if plan.usd_endpoint is not None and settings.price:
        price = f"${settings.price.prompt:g} in and ${settings.price.completion:g} out a million tokens"
        yield "endpoint", f"${plan.usd_endpoint:,.2f} at {price}"


def _cells(layout: GpuLayout) -> tuple[str, ...]:
    return (
        layout.gpu,
        str(layout.n_gpus),
        layout.name,
        format_bytes(layout.weight_bytes),
        f"{layout.n_sequences:,}",
        f"< {layout.tokens_per_s:,.0f}",
    )
