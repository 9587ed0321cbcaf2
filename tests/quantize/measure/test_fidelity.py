"""Divergence against a naive loop in double precision."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pytest

from deepdistill.quantize.measure.fidelity import Reference
from deepdistill.quantize.measure.texts import Text

N_VOCAB = 300
TEXTS = (Text(tuple(range(12)), 5), Text(tuple(range(50, 58)), 1))


class Fixed:
    """A model that says the same random things at the same place, and others with `noise`."""

    def __init__(self, noise: float) -> None:
        self.noise = noise

    def row(self, tokens: Sequence[int], i: int) -> npt.NDArray[np.float32]:
        base = np.random.default_rng(tokens[0] * 100 + i).standard_normal(N_VOCAB) * 3
        return (base + self.noise * np.random.default_rng(i).standard_normal(N_VOCAB) + 40).astype(np.float32)

    def logit_rows(self, tokens: Sequence[int], start: int = 1) -> Iterator[npt.NDArray[np.float32]]:
        shared = np.empty(N_VOCAB, np.float32)
        for i in range(start, len(tokens)):
            shared[:] = self.row(tokens, i)
            yield shared


def naive(reference: Fixed, other: Fixed) -> tuple[list[float], list[bool], float]:
    divergences, same, loss = [], [], 0.0
    for text in TEXTS:
        for i in range(text.n_prompt, len(text.tokens)):
            a, b = (model.row(text.tokens, i).astype(np.float64) for model in (reference, other))
            p, q = (np.exp(row - row.max()) / np.exp(row - row.max()).sum() for row in (a, b))
            divergences.append(sum(float(x) * math.log(float(x) / float(y)) for x, y in zip(p, q, strict=True)))
            same.append(bool(a.argmax() == b.argmax()))
            loss -= math.log(float(q[text.tokens[i]]))
    return divergences, same, math.exp(loss / len(divergences))


@pytest.mark.parametrize("noise", [0.02, 0.7])
def test_divergence_is_that_of_the_definition(noise: float) -> None:
    plain, other = Fixed(0), Fixed(noise)
    found = Reference.of(plain, TEXTS).measure(other)
    divergences, same, perplexity = naive(plain, other)
    assert found.n_tokens == len(divergences) == 14
    assert found.kl_mean == pytest.approx(np.mean(divergences), rel=2e-3, abs=2e-6)
    assert found.kl_p99 == pytest.approx(np.quantile(divergences, 0.99), rel=2e-3, abs=2e-6)
    assert found.kl_error == pytest.approx(np.std(divergences) / math.sqrt(14), rel=5e-3, abs=2e-6)
    assert found.same_top == pytest.approx(np.mean(same))
    assert found.perplexity == pytest.approx(perplexity, rel=1e-5)
    assert found.reference_perplexity == pytest.approx(naive(plain, plain)[2], rel=1e-5)


def test_a_model_is_as_far_from_itself_as_rounding() -> None:
    found = Reference.of(Fixed(0), TEXTS).measure(Fixed(0))
    assert found.kl_mean < 2e-6
    assert found.same_top == 1
