"""Choose the next token with llama.cpp's own samplers, so that no logit passes through Python.

The chain is [penalties, DRY, top-k, top-p, min-p, temperature, a seeded draw], or greedy after the first two. A
grammar or a JSON schema checks the chosen token first; only if it refuses that one, it is applied to all of them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from ..core.generation import Guidance, Sampling
from .grammar import GrammarConstraint, as_array
from .library import llama_cpp
from .llama import Context, Model

if TYPE_CHECKING:
    from .json_schema import SchemaConstraint

_DRY_BASE, _DRY_ALLOWED = 1.75, 2  # llama.cpp's defaults: repeats of up to 2 tokens cost nothing
_DRY_AGAINST_LOOPS = 1.0
_PENALIZED = 64  # last tokens that the repeat penalty looks at
_CANDIDATE = [("id", "i4"), ("logit", "f4"), ("p", "f4")]  # numpy's words for llama_token_data


class Sampler:
    """One sequence's sampler. Every token that joins the sequence is accepted by it, sampled or not."""

    def __init__(self, model: Model, sampling: Sampling, *, guidance: Guidance, seed: int) -> None:
        self._model, self._sampling, self._guidance, self._seed = model, sampling, guidance, seed
        self._dry = guidance.dry_multiplier
        self._chain = self._make_chain()
        self._constraint: GrammarConstraint | SchemaConstraint | None = None

    def _make_chain(self) -> Any:
        sampling, stages = self._sampling, []
        if self._guidance.repeat_penalty != 1:
            stages += [_penalties(self._model.n_vocab, self._guidance.repeat_penalty)]
        if self._dry > 0:
            breakers = (ctypes.c_char_p * 1)()
            window = self._model.n_ctx_train or 4096
            stages += [
                llama_cpp.llama_sampler_init_dry(
                    self._model.vocab, self._dry, _DRY_BASE, _DRY_ALLOWED, window, breakers, 0
                )
            ]
        if sampling.temperature <= 0:
            stages += [llama_cpp.llama_sampler_init_greedy()]
        else:
            stages += [llama_cpp.llama_sampler_init_top_k(sampling.top_k)] if sampling.top_k > 0 else []
            stages += [llama_cpp.llama_sampler_init_top_p(sampling.top_p, 1)] if sampling.top_p < 1 else []
            stages += [llama_cpp.llama_sampler_init_min_p(sampling.min_p, 1)] if sampling.min_p > 0 else []
            stages += [llama_cpp.llama_sampler_init_temp(sampling.temperature)]
            stages += [
                llama_cpp.llama_sampler_init_dist(self._seed % 0xFFFFFFFF)
            ]  # 0xFFFFFFFF would mean a random seed
        chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
        for stage in stages:
            llama_cpp.llama_sampler_chain_add(chain, stage)
        return chain

    def fight_loops(self, history: Sequence[int]) -> None:
        """Turn DRY on, or up, with the history of the text; random draws continue with another seed."""
        llama_cpp.llama_sampler_free(self._chain)
        self._dry, self._seed = self._dry + _DRY_AGAINST_LOOPS, self._seed + 1
        self._chain = self._make_chain()
        for token in history:
            llama_cpp.llama_sampler_accept(self._chain, token)

    def constrain(self, after_thinking: bool) -> None:
        """Hold the rest of the text to the grammar or the schema, which were checked before."""
        if self._guidance.schema is not None:
            from .json_schema import SchemaConstraint

            self._constraint = SchemaConstraint(self._model, self._guidance.schema, after_thinking=after_thinking)
        elif self._guidance.grammar is not None:
            self._constraint = GrammarConstraint(self._model, self._guidance.grammar, after_thinking=after_thinking)

    def sample(self, context: Context, index: int, banned: Collection[int] = ()) -> int:
        """Return the token chosen from one entry's logits of the last batch; `accept` it if it is taken."""
        with context.without(index, banned):
            if self._constraint is None:
                return int(llama_cpp.llama_sampler_sample(self._chain, context.handle, index))
            logits = context.logits(index)
            token = self._choose(logits, constrained=False)
            if not self._allows(token):
                token = self._choose(logits, constrained=True)
        self.accept(token)
        return token

    def _choose(self, logits: Any, constrained: bool) -> int:
        import numpy as np

        candidates = np.empty(len(logits), _CANDIDATE)
        candidates["id"], candidates["logit"], candidates["p"] = np.arange(len(logits)), logits, 0
        if constrained and self._constraint:
            self._constraint.restrict(candidates)
        array = as_array(candidates)
        llama_cpp.llama_sampler_apply(self._chain, ctypes.byref(array))
        return int(array.data[array.selected].id)

    def _allows(self, token: int) -> bool:
        import numpy as np

        candidate = np.array([(token, 0.0, 0.0)], _CANDIDATE)
        if self._constraint:
            self._constraint.restrict(candidate)
        return bool(np.isfinite(candidate["logit"][0]))

    def accept(self, token: int) -> None:
        """Record a token that joined the sequence; `sample` has recorded the one that it returned."""
        llama_cpp.llama_sampler_accept(self._chain, token)
        if self._constraint:
            self._constraint.accept(token)

    def close(self) -> None:
        """Free the samplers. More than one call does no harm."""
        if self._chain:
            llama_cpp.llama_sampler_free(self._chain)
        self._chain = None
        if self._constraint:
            self._constraint.close()


def _penalties(n_vocab: int, repeat: float) -> Any:
    arguments = (n_vocab, _PENALIZED, repeat, 0.0, 0.0)
    make = llama_cpp.llama_sampler_init_penalties
    return make(*arguments[-len(make.argtypes) :])  # older releases take no n_vocab
