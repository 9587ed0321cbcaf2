"""How to lay a model out on GPUs: what each holds, how many sequences fit beside the weights, what bounds the speed.

Two ways to spread a model are considered, each on the fewest GPUs that hold it:

- TP × PP: every matrix is cut over the GPUs of a node (tensor parallel), the layers over nodes (pipeline parallel).
- DP + EP, for models with experts: every GPU holds the attention of all layers and the cache of its own sequences
  (data parallel), and its share of the experts (expert parallel). A latent cache cannot be cut by heads, so under TP
  each GPU keeps all of it; under DP each keeps only its own.

Vectors, routers and scales, which every GPU keeps, count as cut like the rest: the reserve holds them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from .catalogue import Gpu
from .parameters import DecoderShape

USED_SHARE = 0.9  # of the memory, as vLLM's default: the rest is for activations, CUDA graphs, communication
NODE = 8  # GPUs
MOST_GPUS = 16 * NODE
_LEAST_SEQUENCES = 16  # fewer at once are no deployment worth its price


@dataclass(frozen=True)
class Load:
    """What a deployment holds and reads: the model in its dtype, and sequences of `length` tokens.

    `expert_bytes` are the bytes of routed experts, `read_bytes` the other bytes that a step reads (all but the input
    embedding), `cache_bytes` the cache of one token over all layers.
    """

    shape: DecoderShape
    bytes: float
    expert_bytes: float
    read_bytes: float
    cache_bytes: float
    length: int
    mean_length: float
    concurrency: int

    def touched(self, n_tokens: float) -> float:
        """Return the share of a layer's experts that a step with n_tokens reads, if routing is even."""
        experts = self.shape.experts
        return 1 - (1 - experts.n_active / experts.n) ** n_tokens if experts else 0.0

    def n_fitting(self, gpu: Gpu, weights: float, cache: float) -> int:
        """Return how many sequences fit on a GPU beside `weights` bytes, with `cache` bytes a token."""
        return max(0, math.floor((USED_SHARE * gpu.memory * 1e9 - weights) / (cache * self.length)))


@dataclass(frozen=True)
class GpuLayout:
    """A model on `n_gpus` of one kind. Bytes are for each GPU, `n_sequences` for the whole deployment.

    `tokens_per_s` is a bound: what the memory's bandwidth allows when `n_running` sequences generate at once. Compute,
    communication and prompts are left out, so no deployment reaches it.
    """

    gpu: str
    tp: int
    pp: int
    dp: int
    ep: int
    weight_bytes: float
    cache_bytes: float
    n_sequences: int
    n_running: int
    read_bytes: float
    tokens_per_s: float

    @property
    def n_gpus(self) -> int:
        """GPUs of one deployment."""
        return self.dp * self.tp * self.pp

    @property
    def name(self) -> str:
        """The degrees of parallelism that are not 1."""
        if self.ep > 1:
            return f"DP {self.dp} + EP {self.ep}"
        return " × ".join(f"{kind} {n}" for kind, n in (("TP", self.tp), ("PP", self.pp)) if n > 1) or "one GPU"


def gpu_layouts(load: Load, gpu: Gpu, n_gpus: int | None = None) -> list[GpuLayout]:
    """Return the smallest layout of each way that holds the load, or the one on `n_gpus`, the fewest GPUs first.

    A way that needs more than 16 nodes is left out. With `n_gpus` a layout may hold as little as one sequence.
    """
    found = []
    for way in (_tensor_parallel(load.shape), _expert_parallel(load.shape)):
        layouts = (_layout(load, gpu, tp=tp, pp=pp, dp=dp) for tp, pp, dp in way)
        least = _LEAST_SEQUENCES if n_gpus is None else 1
        fitting = (one for one in layouts if one.n_sequences >= least and n_gpus in (None, one.n_gpus))
        found += [layout for layout in [next(fitting, None)] if layout]
    return sorted(found, key=lambda layout: (layout.n_gpus, -layout.tokens_per_s))


def _layout(load: Load, gpu: Gpu, *, tp: int, pp: int, dp: int) -> GpuLayout:
    """Return the layout of these degrees, with as many expert as data parallel ones."""
    shape = load.shape
    stage = math.ceil(shape.n_layers / pp) / shape.n_layers  # share of the layers on the fullest stage
    heads = 1 if shape.latent else max(1, shape.n_kv_heads // tp) / shape.n_kv_heads
    weights = (load.bytes - load.expert_bytes + load.expert_bytes / dp) * stage / tp
    cache = load.cache_bytes * stage * heads
    fits = dp * load.n_fitting(gpu, weights, cache)
    running = min(fits, load.concurrency)
    batch = running / pp  # the stages work on a part of the sequences each
    matrices = load.read_bytes + load.expert_bytes / dp * load.touched(batch)
    read = matrices * stage / tp + batch / dp * load.mean_length * cache
    rate = batch * gpu.bandwidth * 1e9 / read
    return GpuLayout(gpu.name, tp, pp, dp, dp, weights, cache, fits, running, read, rate)


def _tensor_parallel(shape: DecoderShape) -> Iterator[tuple[int, int, int]]:
    """Yield (TP, PP, DP), fewest GPUs first: TP 1, 2, 4, 8 in a node; TP 8 × PP over nodes."""
    tps = [tp for tp in (1, 2, 4, 8) if shape.n_heads % tp == 0 and _splits(shape, tp)]
    yield from ((tp, 1, 1) for tp in tps)
    yield from ((tps[-1], pp, 1) for pp in range(2, min(shape.n_layers, MOST_GPUS // tps[-1]) + 1))


def _expert_parallel(shape: DecoderShape) -> Iterator[tuple[int, int, int]]:
    """Yield (TP, PP, DP), fewest GPUs first: 2, 4, 8, then whole nodes that divide the experts."""
    for n in (2, 4, *range(NODE, MOST_GPUS + 1, NODE)):
        if shape.experts and shape.experts.n % n == 0:
            yield 1, 1, n


def _splits(shape: DecoderShape, tp: int) -> bool:
    """Say whether the key-value heads can be cut or copied evenly; a latent cache is always copied."""
    return shape.latent is not None or shape.n_kv_heads % tp == 0 or tp % shape.n_kv_heads == 0
