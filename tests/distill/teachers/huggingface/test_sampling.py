"""The choice of a token against a naive loop over the vocabulary."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepdistill.distill.teachers.huggingface.sampling import choose, draw_uniforms
from deepdistill.localrun.core.generation import Sampling


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**31),
    st.floats(0.1, 2.0),
    st.sampled_from([0, 1, 5, 100]),
    st.sampled_from([0.1, 0.5, 0.9, 1.0]),
    st.sampled_from([0.0, 0.05, 0.5]),
)
def test_choose_against_a_naive_loop(seed: int, temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    rng = np.random.default_rng(seed)
    logits, uniforms = rng.normal(0, 2, (4, 50)), rng.random(4)
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    chosen = choose(torch.tensor(logits), sampling, uniforms=torch.tensor(uniforms))
    for row, u, token in zip(logits, uniforms, chosen.tolist(), strict=True):
        kept = naive_filter(row, temperature, top_k, top_p, min_p)
        in_order = sorted(kept, key=lambda t: -kept[t]) if top_k or top_p < 1 or min_p else sorted(kept)
        total, passed, expected = sum(kept.values()), 0.0, in_order[-1]
        for candidate in in_order:
            passed += kept[candidate] / total
            if passed > u:
                expected = candidate
                break
        assert token == expected or abs(passed - u) < 1e-5
        assert token in kept


def naive_filter(row: Any, temperature: float, top_k: int, top_p: float, min_p: float) -> dict[int, float]:
    """Return the tokens that the filters leave, with their probabilities."""
    exponents = np.exp((row - row.max()) / temperature)
    probabilities = exponents / exponents.sum()
    order = [int(t) for t in np.argsort(-probabilities)]
    order = order[:top_k] if top_k else order
    mass, kept, passed = sum(probabilities[t] for t in order), [], 0.0
    for token in order:
        if passed >= top_p * mass - 1e-9 and kept:
            break
        kept.append(token)
        passed += probabilities[token]
    return {t: float(probabilities[t]) for t in kept if probabilities[t] >= min_p * probabilities[order[0]] - 1e-9}


def test_choose_draws_from_the_distribution() -> None:
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05])).expand(20_000, 4)
    uniforms = draw_uniforms(Sampling(temperature=1.0), 3, 20_000)
    for sampling in (Sampling(temperature=1.0), Sampling(temperature=1.0, top_p=0.99)):
        shares = torch.bincount(choose(logits, sampling, uniforms=uniforms), minlength=4) / 20_000
        assert torch.allclose(shares, torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=0.015)


def test_choose_finds_the_token_in_a_large_vocabulary_as_plain_cumulative_sums_do() -> None:
    rng = np.random.default_rng(5)
    logits = torch.tensor(rng.normal(0, 3, 1000))
    logits[rng.random(1000) < 0.5] = -torch.inf
    logits[768:] = -torch.inf  # so the last of the blocks holds nothing
    uniforms = torch.tensor([0.0, *np.sort(rng.random(3000)), 1 - 1e-16], dtype=torch.float64)
    chosen = choose(logits.expand(len(uniforms), -1), Sampling(temperature=1.0), uniforms=uniforms)
    cumulative = torch.softmax(logits, -1).cumsum(-1)
    below = torch.cat([torch.zeros(1), cumulative])[chosen]
    assert (below <= uniforms + 1e-6).all()
    assert (cumulative[chosen] > uniforms - 1e-6).all()
    assert torch.isfinite(logits[chosen]).all(), "what cannot be said is never chosen"


def test_a_wide_nucleus_is_not_cut_short() -> None:
    """Where the head that is sorted first holds less than top-p, the whole vocabulary counts."""
    logits, sampling = torch.zeros(1, 5000), Sampling(temperature=1.0, top_p=0.9)
    seen = {
        int(choose(logits, sampling, uniforms=torch.tensor([u], dtype=torch.float64)))
        for u in np.linspace(0, 0.999, 3000)
    }
    assert len(seen) > 2500
