"""Continuous batching with transformers' own paged attention (`generate_batch`), for dense models on CUDA.

Rows join and leave the batch at every token, and the KV cache is cut in pages that any row may take: nothing is padded
and nothing copied. CUDA graphs and flash attention come with it where they are installed. A row is sampled with its own
random numbers by a logits processor that leaves one token to choose from; greedy decoding needs none.

transformers has no public way to sample each row with its own seed, nor to give a row its own numbers: a logits
processor here subclasses an internal class of its continuous batching, and is put into the manager it makes. Those
internals changed with nearly every release, so whatever they raise becomes a `PagedCacheError`: the teacher then falls
back to `BatchDecoder`, slower and never wrong. Without it dense models would generate several times slower on a GPU.

Left out on purpose: log-probabilities (a captured graph returns tokens alone, so rows that want them run in
`BatchDecoder`), and models with latent attention, whose keys and values differ in size: the paged cache refuses them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.logits_process import LogitsProcessorList

from ....localrun.core.generation import Sampling
from .batching import SequenceState
from .sampling import choose

_AHEAD = 2  # batches handed over, so that a place is filled in the same step in which it comes free
_POLL_S = 1.0


class PagedCacheError(Exception):
    """The paged cache cannot run this model here. `rows` were drawn and are not done."""

    def __init__(self, reason: object, rows: Sequence[SequenceState]) -> None:
        super().__init__(" ".join(str(reason).split())[:200])
        self.rows = list(rows)


def can_page(model: Any) -> bool:
    """Say whether the paged cache may take a model: dense, without latent attention, on one GPU."""
    config = model.config.get_text_config()
    n_experts = getattr(config, "n_routed_experts", None) or getattr(config, "num_local_experts", None)
    n_experts = n_experts or getattr(config, "num_experts", None)
    n_devices = len(set(getattr(model, "hf_device_map", {}).values()))
    return not n_experts and getattr(config, "kv_lora_rank", None) is None and n_devices < 2


@dataclass(frozen=True)
class Pages:
    """The size of a paged cache: `n` pages of `size` tokens. With `n` None they take most of the free memory."""

    n: int | None = None
    size: int = 256


@dataclass(frozen=True, kw_only=True)
class PagedDecoder:
    """Decodes rows with up to `batch_size` in one step."""

    model: Any
    batch_size: int
    eos_ids: frozenset[int]
    pages: Pages = Pages()

    def run(self, requests: Iterable[SequenceState], sampling: Sampling) -> Iterator[SequenceState]:
        """Yield the rows of `requests` as they end; those that are done when they are drawn come back at once.

        Raises:
            PagedCacheError: transformers refuses, or its cache is too small.
        """
        logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)  # our error repeats its message
        source, live = iter(requests), dict[str, SequenceState]()
        attention = self.model.config._attn_implementation  # transformers may switch it to flash attention
        manager: Any = None
        try:
            with _translated(live):
                manager = self._open(sampling)
                manager.warmup()
                manager.start()
            while True:
                while len(live) < _AHEAD * self.batch_size and (row := next(source, None)):
                    if row.done:
                        yield row
                        continue
                    live[str(row.index)] = row
                    with _translated(live):
                        self._hand_over(manager, row, sampling)
                if not live:
                    return
                with _translated(live):
                    output = _next_output(manager)
                if output is not None:
                    yield self._ended(live.pop(output.request_id), output)
        finally:
            if manager is not None:
                manager.stop(block=True, hard_stop=True)  # also gives the cache's memory back after a crash
                manager.destroy()
            if self.model.config._attn_implementation != attention:
                self.model.set_attn_implementation(attention)

    def _ended(self, row: SequenceState, output: Any) -> SequenceState:
        """Put what transformers generated into a row."""
        row.tokens, row.ended = output.generated_tokens, output.generated_tokens[-1] in self.eos_ids
        row.seconds = output.lifespan[1] - output.lifespan[0]
        return row

    def _open(self, sampling: Sampling) -> Any:
        config = transformers.ContinuousBatchingConfig(
            max_requests_per_batch=self.batch_size,
            num_blocks=self.pages.n,
            page_size=self.pages.size,
            max_memory_percent=0.8,  # the filters sort copies of the logits
        )
        eos_ids = sorted(self.eos_ids) or -1
        generation = transformers.GenerationConfig(do_sample=False, eos_token_id=eos_ids, max_new_tokens=None)
        manager = self.model.init_continuous_batching(generation, config)
        if sampling.temperature > 0:
            processors = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([_RowSampler(sampling)]))
            processors.tensors_required = 1
            manager.logit_processor = processors
        return manager

    def _hand_over(self, manager: Any, row: SequenceState, sampling: Sampling) -> None:
        numbers = {"uniforms": row.uniforms, "n_prompt": len(row.prompt)} if sampling.temperature > 0 else {}
        manager.add_request(
            row.prompt,
            request_id=str(row.index),
            max_new_tokens=row.max_new,
            eos_token_id=sorted(self.eos_ids),
            **numbers,
        )


@contextmanager
def _translated(live: Mapping[str, SequenceState]) -> Iterator[None]:
    """Turn what transformers raises into a `PagedCacheError`."""
    try:
        yield
    except (AttributeError, ImportError, RuntimeError, TypeError, ValueError) as error:
        raise PagedCacheError(error, list(live.values())) from error


def _next_output(manager: Any) -> Any:
    """Return the next finished output; None after a while without one.

    Raises:
        RuntimeError: there will be none.
    """
    output = manager.get_result(timeout=_POLL_S)
    if output is None and not manager.is_running():
        raise RuntimeError(manager.background_thread_status.fatal_error or "it stopped")
    if output is not None and output.error is not None:
        raise RuntimeError(output.error)
    return output


class _RowSampler(ContinuousBatchingLogitsProcessor):
    """Chooses each row's token with the row's own random number, and makes every other token impossible.

    The number's place is the token's place in the text. That also holds where transformers prepares a step before the
    token of the last one is known, or evicts a row from a full cache and computes it again.
    """

    supported_kwargs: dict[str, type] = {"uniforms": torch.Tensor, "n_prompt": int}  # noqa: RUF012 - the base's form
    ignored_kwargs: tuple[str, ...] = ()

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> torch.Tensor:
        numbers = [_number(future.state) for future in requests_with_new_token]
        return torch.tensor(numbers, dtype=torch.float32).view(torch.int32)

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        uniforms = tensor_arg[: len(scores)].view(torch.float32).double()
        tokens = choose(scores, self.sampling, uniforms=uniforms, captured=True)
        return torch.full_like(scores, -torch.inf).scatter(1, tokens[:, None], 0.0)


def _number(state: Any) -> float:
    """Return the random number for a request's next token: its position already counts the newest one."""
    uniforms = state.logit_processor_kwargs.get("uniforms")
    if uniforms is None:
        return 0.0  # a row that only warms up
    at = state.position_offset - state.logit_processor_kwargs["n_prompt"]
    return float(uniforms[min(at, len(uniforms) - 1)])
