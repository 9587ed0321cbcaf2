"""Continuous batching with transformers' own paged attention (`generate_batch`), for dense models on CUDA.

Rows join and leave the batch at every token, and the KV cache is cut in pages that any row may take: nothing is padded
and nothing copied. CUDA graphs and flash attention come with it where they are installed. A row is sampled with its own
random numbers by a logits processor of ours, which leaves one token to choose from; greedy decoding needs none.

Left out on purpose: log-probabilities (a captured graph hands out tokens alone, so rows that want them run in
`BatchDecoder`), and models with latent attention, whose keys and values differ in size: the paged cache refuses them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.logits_process import LogitsProcessorList

from ....localrun.core.generation import Sampling
from .batching import Row
from .sampling import choose

_AHEAD = 2  # batches handed over, so that a place is filled in the step in which it comes free
_POLL_S = 1.0


class PagedCacheError(Exception):
    """The paged cache cannot run this model here. `rows` were drawn and are still to be done."""

    def __init__(self, reason: object, rows: Sequence[Row]) -> None:
        super().__init__(" ".join(str(reason).split())[:200])
        self.rows = list(rows)


def can_page(model: Any) -> bool:
    """Say whether the paged cache may take a model: dense, without latent attention, on one GPU."""
    config = model.config.get_text_config()
    n_experts = getattr(config, "n_routed_experts", None) or getattr(config, "num_local_experts", None)
    n_experts = n_experts or getattr(config, "num_experts", None)
    n_devices = len(set(getattr(model, "hf_device_map", {}).values()))
    return not n_experts and getattr(config, "kv_lora_rank", None) is None and n_devices < 2


class PagedDecoder:
    """Decodes rows with up to `batch_size` in one step. `n_pages` None takes most of the free memory for the cache."""

    def __init__(
        self, model: Any, *, batch_size: int, eos_ids: frozenset[int], n_pages: int | None = None, page_size: int = 256
    ) -> None:
        self.model = model
        self.batch_size = batch_size
        self.eos_ids = eos_ids
        self.n_pages = n_pages
        self.page_size = page_size

    def run(self, requests: Iterable[Row], sampling: Sampling) -> Iterator[Row]:
        """Yield the rows of `requests` as they end; those that are over when they are drawn come back at once.

        Raises:
            PagedCacheError: transformers refuses, or its cache is too small.
        """
        logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)  # what it says is in our error
        source, live = iter(requests), dict[str, Row]()
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
                    row = live.pop(output.request_id)
                    row.tokens, row.ended = output.generated_tokens, output.generated_tokens[-1] in self.eos_ids
                    row.seconds = output.lifespan[1] - output.lifespan[0]
                    yield row
        finally:
            if manager is not None:
                manager.stop(block=True, hard_stop=True)  # also gives the cache's memory back after a crash
                manager.destroy()
            if self.model.config._attn_implementation != attention:
                self.model.set_attn_implementation(attention)

    def _open(self, sampling: Sampling) -> Any:
        config = transformers.ContinuousBatchingConfig(
            max_requests_per_batch=self.batch_size,
            num_blocks=self.n_pages,
            page_size=self.page_size,
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

    def _hand_over(self, manager: Any, row: Row, sampling: Sampling) -> None:
        own = {"uniforms": row.uniforms, "n_prompt": len(row.prompt)} if sampling.temperature > 0 else {}
        manager.add_request(
            row.prompt,
            request_id=str(row.index),
            max_new_tokens=row.max_new,
            eos_token_id=sorted(self.eos_ids),
            **own,
        )


@contextmanager
def _translated(live: Mapping[str, Row]) -> Iterator[None]:
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
    """Chooses each row's token with the row's own random number, and leaves no other.

    The number's place is the token's place in the text, which also holds where transformers prepares a step before the
    last one's token is known, or puts a row out of a full cache and computes it again.
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
        tokens = choose(scores, self.sampling, uniforms, captured=True)
        return torch.full_like(scores, -torch.inf).scatter(1, tokens[:, None], 0.0)


def _number(state: Any) -> float:
    """Return the random number for the token after a request's newest one; its position stands behind that already."""
    uniforms = state.logit_processor_kwargs.get("uniforms")
    if uniforms is None:
        return 0.0  # a row that only warms up
    at = state.position_offset - state.logit_processor_kwargs["n_prompt"]
    return float(uniforms[min(at, len(uniforms) - 1)])
