"""What a full-size teacher takes: memory, GPUs, hours and money, from its config and what the user states.

The formulas, and how a plan is shown, stand in `plan_text`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from ...errors import UsageError
from ..teachers.budget import Price
from .catalogue import GPUS, Gpu
from .layouts import Layout, Load, layouts
from .parameters import BITS, Architecture, Dtype, Parameters, count_parameters, load_architecture

CacheDtype = Literal["bf16", "fp8"]


@dataclass(frozen=True)
class PlanSettings:
    """What is planned: `traces` samples of `tokens` each (thinking and answer, on average) from one deployment.

    `teacher` is a known model, a config.json or a folder with one. `dtype` None is what its publisher gives. Without
    `n_gpus` the fewest that hold it are taken; without `tokens_per_s` (a deployment's, measured) a bound stands in.
    `gpu_hour` is in dollars, `price` an endpoint's.
    """

    teacher: str = "DeepSeek-R1"
    traces: int = 10_000
    tokens: int = 4_000
    prompt_tokens: int = 200
    gpu: str = "H200"
    n_gpus: int | None = None
    dtype: Dtype | None = None
    kv_dtype: CacheDtype = "bf16"
    concurrency: int = 256
    tokens_per_s: float | None = None
    gpu_hour: float | None = None
    price: Price | None = None

    def __post_init__(self) -> None:
        for name in ("traces", "tokens", "concurrency", "n_gpus", "tokens_per_s"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise UsageError(f"{name.replace('_', '-')} must be more than 0, not {value:g}")
        for name in ("prompt_tokens", "gpu_hour"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise UsageError(f"{name.replace('_', '-')} cannot be {value:g}")
        for name, kinds in (("dtype", get_args(Dtype)), ("kv_dtype", get_args(CacheDtype))):
            if getattr(self, name) not in (None, *kinds):
                raise UsageError(f"no {name.replace('_', '-')} {getattr(self, name)!r}", f"one of {', '.join(kinds)}")

    @property
    def cache_bits(self) -> int:
        """Bits of a number in the KV cache."""
        return 8 if self.kv_dtype == "fp8" else 16


@dataclass(frozen=True)
class Plan:
    """What a teacher takes. `layouts` are the ways on the GPU asked for, the first of them planned with.

    With `is_bound` the throughput is what the memory's bandwidth allows, so that the hours and the rent are the least,
    not the likely. Dollars are None without a price.
    """

    settings: PlanSettings
    model: str
    source: str
    gpu: Gpu
    shape: Architecture
    counts: Parameters
    dtype: Dtype
    load: Load
    weight_bytes: dict[Dtype, float]
    plain_cache_bytes: float
    layouts: list[Layout]
    elsewhere: dict[str, Layout | None]
    tokens_per_s: float
    is_bound: bool
    hours: float
    usd_rented: float | None
    usd_endpoint: float | None
    notes: list[str]


def plan(settings: PlanSettings) -> Plan:
    """Return what the teacher takes.

    Raises:
        UsageError: an unknown model or GPU, or GPUs that do not hold it.
        ArtifactError: a config.json that cannot be read, lacks a field, or is of a model that is not covered.
    """
    model, source, shape = load_architecture(settings.teacher)
    counts, gpu, dtype = count_parameters(shape), find_gpu(settings.gpu), settings.dtype or shape.own_dtype
    at_once = min(settings.concurrency, settings.traces)
    load = Load.of(shape, counts, dtype, settings.cache_bits, settings.prompt_tokens, settings.tokens, at_once)
    ways = layouts(load, gpu, settings.n_gpus)
    if not ways:
        raise _does_not_fit(model, dtype, load, gpu, settings.n_gpus)
    rate = settings.tokens_per_s or ways[0].tokens_per_s
    hours = settings.traces * settings.tokens / rate / 3600
    price = settings.price
    return Plan(
        settings=settings,
        model=model,
        source=source,
        gpu=gpu,
        shape=shape,
        counts=counts,
        dtype=dtype,
        load=load,
        weight_bytes={kind: counts.bytes(kind) for kind in BITS},
        plain_cache_bytes=shape.n_layers * shape.plain_numbers * settings.cache_bits / 8,
        layouts=ways,
        elsewhere={one.name: next(iter(layouts(load, one)), None) for one in GPUS},
        tokens_per_s=rate,
        is_bound=settings.tokens_per_s is None,
        hours=hours,
        usd_rented=None if settings.gpu_hour is None else hours * ways[0].n_gpus * settings.gpu_hour,
        usd_endpoint=None if price is None else settings.traces * price.of(settings.prompt_tokens, settings.tokens),
        notes=_notes(settings, shape, dtype, gpu, ways[0]),
    )


def find_gpu(name: str) -> Gpu:
    """Return the GPU of a name, however it is spelt: `h100`, `RTX4090`, `A100-80`.

    Raises:
        UsageError: it is not known.
    """
    key = "".join(c for c in name.lower() if c.isalnum())
    for gpu in GPUS:
        own = "".join(c for c in gpu.name.lower() if c.isalnum())
        if key in (own, own.removeprefix("rtx"), own + "gb") or (key == "a100" and own == "a10080"):
            return gpu
    raise UsageError(f"no GPU named {name!r} in the table", f"one of {', '.join(gpu.name for gpu in GPUS)}")


def _does_not_fit(model: str, dtype: Dtype, load: Load, gpu: Gpu, n_gpus: int | None) -> UsageError:
    smallest = layouts(load, gpu)
    on = f"{n_gpus} × {gpu.name}" if n_gpus else f"128 × {gpu.name}"
    hint = f"the fewest that hold it: {smallest[0].n_gpus} ({smallest[0].name})" if smallest else "take larger GPUs"
    return UsageError(
        f"{model} in {dtype} ({load.bytes / 1e9:,.0f} GB) does not lie on {on}",
        f"{hint}; a smaller --dtype takes fewer. TP is 1, 2, 4 or 8 and divides the heads; more GPUs are whole nodes",
    )


def _notes(settings: PlanSettings, shape: Architecture, dtype: Dtype, gpu: Gpu, way: Layout) -> list[str]:
    length = settings.prompt_tokens + settings.tokens
    notes = []
    if not shape.is_checked:
        notes.append(f"model type {shape.model_type or 'unknown'} was not checked against a reference: an estimate")
    if shape.context and length > shape.context:
        notes.append(f"{length:,} tokens a sequence are more than the model's context of {shape.context:,}")
    if dtype == "fp8" and not gpu.fp8:
        notes.append(f"{gpu.name} does not compute in fp8: the weights are widened as they are used, if the server can")
    if settings.tokens_per_s and settings.tokens_per_s > way.tokens_per_s:
        at_once = f"{way.n_running} sequences at once on {way.n_gpus} × {gpu.name}"
        notes.append(f"{settings.tokens_per_s:,.0f} tokens/s are above what bounds {at_once}: was it more GPUs?")
    return notes
