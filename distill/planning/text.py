"""A plan as people and programs read it: the figures, every formula with its numbers put in, and one JSON object."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...localrun.core.text import format_bytes
from .layouts import USED_SHARE, Layout
from .parameters import BITS
from .plan import Plan

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Formula:
    """How a figure comes about: in words, with its numbers put in (arithmetic that gives `value`), and its unit."""

    name: str
    words: str
    numbers: str
    value: float
    unit: str = ""


def formulas(plan: Plan) -> list[Formula]:
    """Return every figure of a plan with the formula that it comes from, in the order they build on each other."""
    return [*_of_size(plan), *_of_cache(plan), *_of_layout(plan, plan.layouts[0]), *_of_cost(plan)]


def plan_json(plan: Plan) -> dict[str, Any]:
    """Return the plan as plain values, its formulas included."""
    record = dataclasses.asdict(plan)
    found = [*plan.layouts, *plan.elsewhere.values()]
    for way, layout in zip([*record["layouts"], *record["elsewhere"].values()], found, strict=True):
        if layout:
            way |= {"name": layout.name, "n_gpus": layout.n_gpus}
    record["counts"] |= {"total": plan.counts.total, "active": plan.counts.active}
    return record | {"formulas": [dataclasses.asdict(formula) for formula in formulas(plan)]}


def print_plan(plan: Plan, console: Console) -> None:
    """Print the plan, readable at 80 columns and without colour."""
    from rich.table import Table
    from rich.text import Text

    facts = Table.grid(padding=(0, 2))
    facts.add_column(no_wrap=True, style="dim")
    facts.add_column(overflow="fold")
    for name, value in _facts(plan):
        facts.add_row(name, Text(value))
    console.print(Text(plan.model, style="bold"), Text(plan.source, style="dim"), facts, "", sep="\n")

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for title in ("GPU", "GPUs", "parallelism", "weights each", "sequences", "tokens/s"):
        table.add_column(title, justify="left" if title in ("GPU", "parallelism") else "right", no_wrap=True)
    for layout in plan.layouts:
        table.add_row(*_cells(layout), style="bold")
    for name, other in plan.elsewhere.items():
        if name != plan.gpu.name:
            table.add_row(*(_cells(other) if other else (name, "more than 128", "", "", "", "")))
    console.print(table)
    for line in (_KEY, *(f"note: {note}" for note in plan.notes)):
        console.print(Text(line, style="dim" if line is _KEY else ""))

    console.print(Text("\nformulas", style="bold"))
    for formula in formulas(plan):
        console.print(Text(f"{formula.name}: {formula.words}"))
        console.print(Text(f"    {_readable(formula.numbers)}\n    = {_valued(formula)}", style="dim"))


_KEY = (
    f"sequences: how many of this length fit beside the weights, in {USED_SHARE:.0%} of the memory. tokens/s: what the "
    "memory's bandwidth allows them at most; compute, communication and prompts take more. Measure yours and give "
    "--tokens-per-s."
)


def _facts(plan: Plan) -> Iterator[tuple[str, str]]:
    shape, settings, way = plan.shape, plan.settings, plan.layouts[0]
    yield "parameters", f"{plan.counts.total / 1e9:.1f} B, {plan.counts.active / 1e9:.1f} B active a token"
    if experts := shape.experts:
        yield (
            "experts",
            f"{experts.n_active} of {experts.n} active a token, in {experts.n_layers} of {shape.n_layers} layers",
        )
    yield "weights", ", ".join(f"{kind} {format_bytes(int(size))}" for kind, size in plan.weight_bytes.items())
    cache, plain = plan.load.cache_bytes, plan.plain_cache_bytes
    kind = "latent" if shape.latent else "grouped-query" if shape.n_kv_heads < shape.n_heads else "multi-head"
    plain_text = f"; plain multi-head attention would take {plain / cache:.1f} times that" if plain > cache else ""
    yield "KV cache", f"{cache / 1e3:.1f} kB a token in {settings.kv_dtype}, {kind} attention{plain_text}"
    yield "planned", f"{plan.dtype} on {way.n_gpus} × {plan.gpu.name}, {way.name}"
    stated = f"at most, a bound: {way.n_running} sequences at once" if plan.is_bound else "as stated"
    yield "throughput", f"{plan.tokens_per_s:,.0f} tokens/s {stated}"
    least = "at least " if plan.is_bound else ""
    what = f"{settings.traces:,} traces of {settings.tokens:,} tokens"
    yield "time", f"{least}{plan.hours:,.1f} h for {what}"
    if plan.usd_rented is not None:
        yield "rented", f"{least}${plan.usd_rented:,.2f}: {way.n_gpus} GPUs at ${settings.gpu_hour:g} an hour"
    if plan.usd_endpoint is not None and settings.price:
        price = f"${settings.price.prompt:g} in and ${settings.price.completion:g} out a million tokens"
        yield "endpoint", f"${plan.usd_endpoint:,.2f} at {price}"


def _cells(layout: Layout) -> tuple[str, ...]:
    return (
        layout.gpu,
        str(layout.n_gpus),
        layout.name,
        format_bytes(int(layout.weight_bytes)),
        f"{layout.n_sequences:,}",
        f"< {layout.tokens_per_s:,.0f}",
    )


def _of_size(plan: Plan) -> Iterator[Formula]:
    c, dtype = plan.counts, plan.dtype
    parts = "attention + dense and shared FFN + {} + routers + norms and biases"
    rest = f"{c.routers} + {c.vectors}"
    yield Formula(
        "parameters",
        "embedding + head + " + parts.format("experts"),
        f"{c.embedding} + {c.head} + {c.attention} + {c.dense} + {c.experts} + {rest}",
        c.total,
    )
    yield Formula(
        "active a token",
        "head + " + parts.format("active experts"),
        f"{c.head or c.embedding} + {c.attention} + {c.dense} + {c.active_experts} + {rest}",
        c.active,
    )
    yield Formula(
        f"weights in {dtype}",
        "(the layers' matrices × bits, block scales included + the rest × 16) / 8",
        f"({c.in_blocks} × {BITS[dtype]} + {c.total - c.in_blocks} × 16) / 8",
        plan.load.bytes,
        "bytes",
    )


def _of_cache(plan: Plan) -> Iterator[Formula]:
    shape, width = plan.shape, plan.settings.cache_bits // 8
    cached, own = "2 × kv heads × head dim", f"2 × {shape.n_kv_heads} × {shape.head_dim}"
    plain, all_own = "2 × heads × head dim", f"2 × {shape.n_heads} × {shape.head_dim}"
    if latent := shape.latent:
        cached, own = "(kv_lora_rank + qk_rope_head_dim)", f"({latent.kv_rank} + {latent.rope_dim})"
        plain = "heads × (qk_nope_head_dim + qk_rope_head_dim + v_head_dim)"
        all_own = f"{shape.n_heads} × ({latent.nope_dim} + {latent.rope_dim} + {latent.v_dim})"
    for name, words, numbers, value in (
        ("KV cache a token", cached, own, plan.load.cache_bytes),
        ("with plain multi-head attention", plain, all_own, plan.plain_cache_bytes),
    ):
        yield Formula(name, f"layers × {words} × bytes", f"{shape.n_layers} × {numbers} × {width}", value, "bytes")


def _of_layout(plan: Plan, way: Layout) -> Iterator[Formula]:
    load, shape, gpu, settings = plan.load, plan.shape, plan.gpu, plan.settings
    usable = USED_SHARE * gpu.memory * 1e9
    yield Formula("usable memory of a GPU", "share × memory", f"{USED_SHARE} × {gpu.memory * 1e9:.0f}", usable, "bytes")
    stage = f"{math.ceil(shape.n_layers / way.pp)} / {shape.n_layers}"
    words, numbers = "weights × share of the fullest stage / TP", f"{load.bytes} × {stage} / {way.tp}"
    if way.ep > 1:
        words = "weights − experts + experts / EP"
        numbers = f"{load.bytes} − {load.expert_bytes} + {load.expert_bytes} / {way.ep}"
    yield Formula("weights on a GPU", words, numbers, way.weight_bytes, "bytes")
    if way.pp > 1 or way.cache_bytes < load.cache_bytes:
        heads = 1.0 if shape.latent else max(1, shape.n_kv_heads // way.tp) / shape.n_kv_heads
        yield Formula(
            "KV cache a token on a GPU",
            "cache × share of the fullest stage × share of the kv heads",
            f"{load.cache_bytes} × {stage} × {heads}",
            way.cache_bytes,
            "bytes",
        )
    length = f"({settings.prompt_tokens} + {settings.tokens})"
    each = f"floor(({usable:.0f} − {way.weight_bytes}) / ({way.cache_bytes} × {length}))"
    yield Formula(
        "sequences that fit",
        "DP × " * (way.dp > 1) + "floor((usable − weights) / (cache a token × (prompt + tokens)))",
        f"{way.dp} × {each}" if way.dp > 1 else each,
        way.n_sequences,
    )
    yield from _of_bound(plan, way, stage)


def _of_bound(plan: Plan, way: Layout, stage: str) -> Iterator[Formula]:
    load, settings, experts = plan.load, plan.settings, plan.shape.experts
    batch = way.n_running / way.pp  # sequences in a step of one stage; under DP, of all GPUs together
    words, numbers, cut = "weights but the embedding", f"{load.read_bytes}", f"{stage} / {way.tp}"
    if experts:
        touched = f"(1 − (1 − {experts.n_active} / {experts.n}) ^ {batch})"
        words += " and experts + experts × share that a step touches"
        numbers += f" + {load.expert_bytes} × {touched}"
    if way.ep > 1:
        words, numbers = f"{words} / EP", f"{numbers} / {way.ep}"
    else:
        words, numbers = f"({words}) × share of the stage / TP", f"({numbers}) × {cut}"
    mean = f"({settings.prompt_tokens} + {settings.tokens} / 2)"
    yield Formula(
        "bytes that a GPU reads a step",
        words + " + its sequences × mean length × cache a token",
        f"{numbers} + {batch / way.dp} × {mean} × {way.cache_bytes}",
        way.read_bytes,
        "bytes",
    )
    yield Formula(
        "tokens a second at most",
        "sequences in a step × bandwidth / bytes read a step",
        f"{batch} × {plan.gpu.bandwidth * 1e9:.0f} / {way.read_bytes}",
        way.tokens_per_s,
        "tokens/s",
    )


def _of_cost(plan: Plan) -> Iterator[Formula]:
    settings, way = plan.settings, plan.layouts[0]
    yield Formula(
        "hours",
        "traces × tokens / tokens a second / 3600",
        f"{settings.traces} × {settings.tokens} / {plan.tokens_per_s} / 3600",
        plan.hours,
        "h",
    )
    if plan.usd_rented is not None:
        numbers = f"{plan.hours} × {way.n_gpus} × {settings.gpu_hour}"
        yield Formula("rent", "hours × GPUs × dollars an hour", numbers, plan.usd_rented, "dollars")
    if plan.usd_endpoint is not None and (price := settings.price):
        tokens = f"({settings.prompt_tokens} × {price.prompt} + {settings.tokens} × {price.completion})"
        yield Formula(
            "endpoint",
            "traces × (prompt × IN + tokens × OUT) / 10⁶",
            f"{settings.traces} × {tokens} / 1000000",
            plan.usd_endpoint,
            "dollars",
        )


def _valued(formula: Formula) -> str:
    value = formula.value
    if formula.unit == "bytes":
        return f"{value / 1e3:,.2f} kB" if value < 1e8 else format_bytes(int(value))
    if formula.unit == "dollars":
        return f"${value:,.2f}"
    return f"{value:,.1f} {formula.unit}" if formula.unit else _short(value)


def _readable(numbers: str) -> str:
    """Return arithmetic with its large and long numbers shortened: 653.9 G, 42.8 M."""
    return re.sub(r"\d+(?:\.\d+)?(?:e[-+]\d+)?", lambda match: _short(float(match[0])), numbers)


def _short(number: float) -> str:
    for size, suffix in ((1e9, " G"), (1e6, " M")):
        if number >= size:
            return f"{number / size:,.5g}{suffix}"
    return f"{number:,.0f}" if number == int(number) else f"{number:.5g}"
