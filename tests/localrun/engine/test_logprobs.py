"""The most probable tokens of a row of logits, against sorting all of it, and of a model against its own logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepdistill.localrun.core.generation import Sampling
from deepdistill.localrun.engine.engine import Engine
from deepdistill.localrun.engine.logprobs import top_of


def prompt_of(engine: Engine, question: str) -> str:
    return engine.render([{"role": "user", "content": question}])


@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_top_logprobs_are_those_of_the_models_own_logits(random_gguf: Path, temperature: float) -> None:
    """At any temperature: they are the model's, not the sampler's."""
    with Engine(random_gguf, n_ctx=256, n_seq=4, n_threads=1) as engine:
        prompts = [prompt_of(engine, f"{i} {'and ' * 15}") for i in range(6)] + ["", prompt_of(engine, "so?")]
        sampling = Sampling(temperature, top_k=3, max_tokens=60)
        done = dict(engine.generate_many(prompts, sampling, top_logprobs=7))
        plain = dict(engine.generate_many(prompts, sampling))
        assert done[6].logprobs is None
        for i in (0, 1, 2, 3, 4, 5, 7):
            top, made = done[i].logprobs, done[i].token_ids
            assert (plain[i].logprobs, plain[i].token_ids) == (None, made)
            assert top is not None
            assert made is not None
            assert top.ids.shape == top.values.shape == (len(made), 7)
            tokens = engine.tokenize(prompts[i])
            logits = engine.logits([*tokens, *made])[len(tokens) - 1 : -1].astype(np.float64)
            expected = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
            np.testing.assert_allclose(
                top.values, np.take_along_axis(expected, top.ids, 1), atol=0.05
            )  # other kernels, f16 cache
            np.testing.assert_allclose(top.values, -np.sort(-expected)[:, :7], atol=0.05)
            again = engine.top_logprobs([*tokens, *made], 7, len(tokens))
            np.testing.assert_allclose(again.values, top.values, atol=0.05)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([5, 64, 129, 3000]), st.sampled_from([1, 4, 40, 4000]))
def test_the_highest_logits_are_found_whatever_their_order(seed: int, n_vocab: int, k: int) -> None:
    row = np.random.default_rng(seed).normal(0, 5, n_vocab).astype(np.float32)
    row[:: 1 + seed % 7] -= np.inf if seed % 2 else 0
    row[-1] = 1
    ids, values = top_of(row, k)
    order = np.argsort(-row, kind="stable")[:k]
    assert np.array_equal(row[ids], row[order])
    assert len(set(ids.tolist())) == min(k, n_vocab)
    exact = row.astype(np.float64)
    np.testing.assert_allclose(values, exact[ids] - np.log(np.exp(exact - exact.max()).sum()) - exact.max(), atol=1e-4)
