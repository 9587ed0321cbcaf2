"""What it takes to serve a full-size teacher: memory, GPUs, hours and money, from its config and the user's figures.

docs/planning.md says how each figure is computed; `text` shows them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from ...errors import UsageError
from ...localrun.core.text import format_bytes
from ..recipe.gathering import Price
from .catalogue import GPUS, Gpu
from .layouts import MOST_GPUS, GpuLayout, Load, gpu_layouts
from .parameters import BITS, DecoderShape, Dtype, Parameters, count_parameters, load_shape

CacheDtype = Literal["bf16", "fp8"]


@dataclass(frozen=True)
class PlanSettings:
    """What is planned: `traces` samples of `tokens` each (thinking and answer, on average) from one deployment.

    `teacher` is a known model, a config.json or a folder with one. `dtype` None is what its publisher gives. Without
    `n_gpus` the fewest that hold it are taken; without `tokens_per_s` (a deployment's, measured) a bound is used.
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
        least = {"prompt_tokens": 0, "gpu_hour": 0}  # of the others more than 0
        for name in ("traces", "tokens", "concurrency", "n_gpus", "tokens_per_s", "prompt_tokens", "gpu_hour"):
            value = getattr(self, name)
            if value is not None and not (0 < value < float("inf") or value == least.get(name)):
                raise UsageError(f"{name.replace('_', '-')} cannot be {value:g}", code="number-out-of-range")
        for name, kinds in (("dtype", get_args(Dtype)), ("kv_dtype", get_args(CacheDtype))):
            if getattr(self, name) not in (None, *kinds):
                raise UsageError(
                    f"no {name.replace('_', '-')} {getattr(self, name)!r}",
                    f"one of {', '.join(kinds)}",
                    code="no-such-choice",
                )

    @property
    def cache_bits(self) -> int:
        """Bits of a number in the KV cache."""
        return 8 if self.kv_dtype == "fp8" else 16


@dataclass(frozen=True)
class ServingPlan:
    """What a teacher takes. `layouts` are those on the GPU asked for; the figures hold for the first of them.

    With `is_bound` the throughput is what the memory's bandwidth allows, so that the hours and the rent are the least,
    not the likely ones. Dollars are None without a price.
    """

    settings: PlanSettings
    model: str
    source: str
    gpu: Gpu
    shape: DecoderShape
    counts: Parameters
    dtype: Dtype
    load: Load
    weight_bytes: dict[Dtype, float]
    plain_cache_bytes: float
    layouts: list[GpuLayout]
    elsewhere: dict[str, GpuLayout | None]
    tokens_per_s: float
    is_bound: bool
    hours: float
    usd_rented: float | None
    usd_endpoint: float | None
    notes: list[str]


def plan(settings: PlanSettings) -> ServingPlan:
    """Return what the teacher takes.

    Raises:
        UsageError: `code` "no-such-model", "no-such-gpu" or "does-not-fit-gpus".
        ArtifactError: `code` "config-broken" or "model-not-covered".
    """
    model, source, shape = load_shape(settings.teacher)
    counts, gpu, dtype = count_parameters(shape), find_gpu(settings.gpu), settings.dtype or shape.published_dtype
    load = load_of(shape, counts, dtype=dtype, settings=settings)
    layouts = gpu_layouts(load, gpu, settings.n_gpus)
    if not layouts:
        raise _does_not_fit(f"{model} in {dtype}", load, gpu=gpu, n_gpus=settings.n_gpus)
    tokens_per_s = settings.tokens_per_s or layouts[0].tokens_per_s
    hours = settings.traces * settings.tokens / tokens_per_s / 3600
    price, gpu_hour = settings.price, settings.gpu_hour
    return ServingPlan(
        settings,
        model,
        source,
        gpu,
        shape,
        counts,
        dtype,
        load,
        weight_bytes={kind: counts.bytes(kind) for kind in BITS},
        plain_cache_bytes=shape.plain_kv_numbers * settings.cache_bits / 8,
        layouts=layouts,
        elsewhere={one.name: next(iter(gpu_layouts(load, one)), None) for one in GPUS},
        tokens_per_s=tokens_per_s,
        is_bound=settings.tokens_per_s is None,
        hours=hours,
        usd_rented=None if gpu_hour is None else hours * layouts[0].n_gpus * gpu_hour,
        usd_endpoint=None if price is None else settings.traces * price.of(settings.prompt_tokens, settings.tokens),
        notes=[*_model_notes(settings, shape), *_gpu_notes(settings, dtype, gpu=gpu, layout=layouts[0])],
    )


def load_of(shape: DecoderShape, counts: Parameters, *, dtype: Dtype, settings: PlanSettings) -> Load:
    """Return what a deployment holds and reads."""
    whole, experts = counts.bytes(dtype), counts.expert_bytes(dtype)
    return Load(
        shape,
        bytes=whole,
        expert_bytes=experts,
        read_bytes=whole - experts - (2 * counts.embedding if counts.head else 0),
        cache_bytes=shape.kv_numbers * settings.cache_bits / 8,
        length=settings.prompt_tokens + settings.tokens,
        mean_length=settings.prompt_tokens + settings.tokens / 2,  # on average half of an answer is written
        concurrency=min(settings.concurrency, settings.traces),
    )


def find_gpu(name: str) -> Gpu:
    """Return the GPU of a name, however it is spelt: `h100`, `RTX4090`, `A100-80`.

    Raises:
        UsageError: `code` "no-such-gpu".
    """
    key = "".join(c for c in name.lower() if c.isalnum())
    for gpu in GPUS:
        known = "".join(c for c in gpu.name.lower() if c.isalnum())
        if key in (known, known.removeprefix("rtx"), known + "gb") or (key == "a100" and known == "a10080"):
            return gpu
    names = ", ".join(gpu.name for gpu in GPUS)
    raise UsageError(f"the table of GPUs has no {name!r}", f"one of {names}", code="no-such-gpu")


def _does_not_fit(model: str, load: Load, *, gpu: Gpu, n_gpus: int | None) -> UsageError:
    smallest = gpu_layouts(load, gpu)
    fewest = f"the fewest that hold it: {smallest[0].n_gpus} ({smallest[0].name})" if smallest else "take larger GPUs"
    return UsageError(
        f"{model} ({format_bytes(load.bytes)}) does not fit on {n_gpus or MOST_GPUS} × {gpu.name}",
        f"{fewest}; a smaller --dtype takes fewer. TP is 1, 2, 4 or 8 and divides the heads; more GPUs are whole nodes",
        code="does-not-fit-gpus",
    )


def _model_notes(settings: PlanSettings, shape: DecoderShape) -> Iterator[str]:
    length = settings.prompt_tokens + settings.tokens
    if not shape.is_checked:
        yield f"model type {shape.model_type or 'unknown'} was not checked against a reference: this is an estimate"
    if shape.context and length > shape.context:
        yield f"a sequence of {length:,} tokens is longer than the model's context of {shape.context:,}"


def _gpu_notes(settings: PlanSettings, dtype: Dtype, *, gpu: Gpu, layout: GpuLayout) -> Iterator[str]:
    if dtype == "fp8" and not gpu.fp8:
        yield f"{gpu.name} does not compute in fp8: the server has to widen the weights as it uses them, if it can"
    if settings.tokens_per_s and settings.tokens_per_s > layout.tokens_per_s:
        at_once = f"{layout.n_running} sequences at once on {layout.n_gpus} × {gpu.name}"
        yield f"{settings.tokens_per_s:,.0f} tokens/s are more than the bound for {at_once}: were there more GPUs?"
