"""How a model lies on GPUs: what each holds, how many sequences fit beside the weights, and what bounds their speed.

Two ways to spread it are considered, each with as few GPUs as hold it:

- TP × PP: every matrix is cut over the GPUs of a node (tensor parallel), the layers over nodes (pipeline parallel).
- DP + EP, for models with experts: every GPU holds the attention of all layers and the cache of its own sequences
  (data parallel), and its share of the experts (expert parallel). A latent cache cannot be cut by heads, so under TP
  each GPU keeps all of it; under DP each keeps only its own.

A vector, a router or a scale that every GPU keeps is counted as cut like the rest; it goes to the reserve.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from .catalogue import Gpu
from .parameters import Architecture, Dtype, Parameters

USED_SHARE = 0.9  # of the memory, as vLLM's default: the rest is for activations, CUDA graphs, communication
NODE = 8  # GPUs
_MOST_NODES = 16
_LEAST_SEQUENCES = 16  # fewer at once are no deployment worth its price


@dataclass(frozen=True)
class Load:
    """What is to be held and read: the model in its dtype, and sequences of so many tokens.

    `expert_bytes` are those of `bytes` that lie in routed experts; `read_bytes` what a step reads of the rest (all but
    the input embedding). `cache_bytes` are a token's, over all layers.
    """

    shape: Architecture
    bytes: float
    expert_bytes: float
    read_bytes: float
    cache_bytes: float
    length: int
    mean_length: float
    concurrency: int

    @classmethod
    def of(
        cls,
        shape: Architecture,
        counts: Parameters,
        dtype: Dtype,
        cache_bits: int,
        prompt_tokens: int,
        tokens: int,
        concurrency: int,
    ) -> Load:
        """Return the load of answering prompts of `prompt_tokens` with `tokens`, so many at once at most."""
        whole, experts = counts.bytes(dtype), counts.expert_bytes(dtype)
        return cls(
            shape,
            whole,
            experts,
            whole - experts - (2 * counts.embedding if counts.head else 0),
            shape.n_layers * shape.cached_numbers * cache_bits / 8,
            prompt_tokens + tokens,
            prompt_tokens + tokens / 2,
            concurrency,
        )

    def touched(self, n_tokens: float) -> float:
        """Return the share of a layer's experts that a step with n_tokens reads, if routing is even."""
        experts = self.shape.experts
        return 1 - (1 - experts.n_active / experts.n) ** n_tokens if experts else 0.0


@dataclass(frozen=True)
class Layout:
    """A model on `n_gpus` of one kind. Bytes are each GPU's; `n_sequences` the whole deployment's.

    `tokens_per_s` is a bound: what the memory's bandwidth allows when `n_running` sequences generate at once. Compute,
    communication and prompts are left out, so that no deployment reaches it.
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


def layouts(load: Load, gpu: Gpu, n_gpus: int | None = None) -> list[Layout]:
    """Return each way's smallest layout that holds the load, or the one on n_gpus; the fewest GPUs first, then speed.

    None is left out if 16 nodes do not hold it. n_gpus of one's own may hold as little as one sequence.
    """
    found = []
    for way in (_tensor_parallel(load, gpu), _expert_parallel(load, gpu)):
        fitting = (
            layout
            for layout in way
            if (layout.n_sequences >= _LEAST_SEQUENCES if n_gpus is None else layout.n_gpus == n_gpus)
        )
        found += [layout for layout in [next(fitting, None)] if layout]
    return sorted(found, key=lambda layout: (layout.n_gpus, -layout.tokens_per_s))


def _tensor_parallel(load: Load, gpu: Gpu) -> Iterator[Layout]:
    """Yield what holds at least a sequence, the fewest GPUs first: in a node TP 1, 2, 4, 8; over nodes TP 8 × PP."""
    shape = load.shape
    tps = [tp for tp in (1, 2, 4, 8) if shape.n_heads % tp == 0 and _splits(shape, tp)]
    for tp, pp in [(tp, 1) for tp in tps] + [(tps[-1], pp) for pp in range(2, _MOST_NODES * NODE // tps[-1] + 1)]:
        if pp > shape.n_layers:
            return
        stage = math.ceil(shape.n_layers / pp) / shape.n_layers  # of the layers, on the fullest stage
        weights = load.bytes * stage / tp
        cache = load.cache_bytes * stage * (1 if shape.latent else max(1, shape.n_kv_heads // tp) / shape.n_kv_heads)
        if fits := _fits(gpu, weights, cache, load):
            running = min(fits, load.concurrency)
            batch = running / pp  # the stages work on a part of the sequences each
            matrices = load.read_bytes + load.expert_bytes * load.touched(batch)
            read = matrices * stage / tp + batch * load.mean_length * cache
            rate = batch * gpu.bandwidth * 1e9 / read
            yield Layout(gpu.name, tp, pp, 1, 1, weights, cache, fits, running, read, rate)


def _expert_parallel(load: Load, gpu: Gpu) -> Iterator[Layout]:
    """Yield what holds a sequence a GPU, the fewest GPUs first: 2, 4, 8, then nodes, as far as they divide experts."""
    experts = load.shape.experts
    for n in (2, 4, *range(NODE, _MOST_NODES * NODE + 1, NODE)) if experts else ():
        if experts is None or experts.n % n:
            continue
        weights = load.bytes - load.expert_bytes + load.expert_bytes / n
        if fits := n * _fits(gpu, weights, load.cache_bytes, load):
            running = min(fits, load.concurrency)
            matrices = load.read_bytes + load.expert_bytes / n * load.touched(running)
            read = matrices + running / n * load.mean_length * load.cache_bytes
            rate = running * gpu.bandwidth * 1e9 / read
            yield Layout(gpu.name, 1, 1, n, n, weights, load.cache_bytes, fits, running, read, rate)


def _splits(shape: Architecture, tp: int) -> bool:
    """Say whether the key-value heads can be cut or copied evenly; a latent cache is always copied."""
    return shape.latent is not None or shape.n_kv_heads % tp == 0 or tp % shape.n_kv_heads == 0


def _fits(gpu: Gpu, weights: float, cache: float, load: Load) -> int:
    return max(0, math.floor((USED_SHARE * gpu.memory * 1e9 - weights) / (cache * load.length)))
