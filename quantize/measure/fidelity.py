"""How far a file has moved from its unquantized model: Kullback-Leibler divergence of the next token, on held-out text.

llama.cpp runs both. The reference's probabilities p are kept as float16, together with the two sums that make the
divergence exact for the rounded values. So a measurement takes one pass over the other model's logits:
KL = sum p log p - p·z + log sum exp z, where z are the logits minus their maximum.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ...localrun.core.reporter import SILENT, Reporter
from .texts import Text


class Reader(Protocol):
    """A model that yields the logits `[V]` for each token of a text from `start` on."""

    def logit_rows(self, tokens: Sequence[int], start: int = 1) -> Iterator[npt.NDArray[np.float32]]:
        """Yield rows; each is valid until the next one."""
        ...


@dataclass(frozen=True)
class Fidelity:
    """A file against its unquantized model, over `n_tokens` of replies; divergences in nats.

    `kl_error` is the standard error of the mean; `same_top` is the share of positions with the same most likely token.
    """

    n_tokens: int
    kl_mean: float
    kl_error: float
    kl_p99: float
    same_top: float
    perplexity: float
    reference_perplexity: float

    def to_json(self) -> dict[str, Any]:
        """Return it as a JSON object, with six digits."""
        return {
            name: value if isinstance(value, int) else float(f"{value:.6g}") for name, value in asdict(self).items()
        }


@dataclass(frozen=True)
class Position:
    """What the reference says at one position: probabilities `[V]` as float16, their sum, sum p log p, its best."""

    probabilities: npt.NDArray[np.float16]
    total: float
    negative_entropy: float
    top: int


@dataclass(frozen=True)
class Reference:
    """The unquantized model's probabilities at every position that predicts a token of the texts' replies."""

    texts: tuple[Text, ...]
    positions: tuple[Position, ...]
    perplexity: float

    @classmethod
    def of(cls, reader: Reader, texts: Sequence[Text], report: Reporter = SILENT) -> Reference:
        """Read the texts with the unquantized model."""
        positions, loss = [], 0.0
        for i, text in enumerate(texts):
            for target, row in _replies(reader, text):
                logprobs = log_softmax(row)
                loss -= float(logprobs[target])
                p = np.exp(logprobs).astype(np.float16)
                exact = p.astype(np.float32)  # the sums are of the rounded values, so KL(p, p) is 0
                positions.append(Position(p, float(exact.sum()), float(exact @ logprobs), int(row.argmax())))
            report.progress("reading unquantized", i + 1, total=len(texts))
        return cls(tuple(texts), tuple(positions), math.exp(loss / max(len(positions), 1)))

    def measure(self, reader: Reader, report: Reporter = SILENT, *, note: str = "") -> Fidelity:
        """Read the same texts with another model of the same vocabulary, and return how it differs."""
        divergences, n_same, loss = [], 0, 0.0
        positions = iter(self.positions)
        for i, text in enumerate(self.texts):
            for target, row in _replies(reader, text):
                position = next(positions)
                shifted = row - row.max()
                log_total = math.log(float(np.exp(shifted).sum()))
                cross = float(position.probabilities.astype(np.float32) @ shifted)
                divergences.append(position.negative_entropy - cross + position.total * log_total)
                n_same += int(row.argmax()) == position.top
                loss += log_total - float(shifted[target])
            report.progress("measuring", i + 1, total=len(self.texts), note=note)
        kl = np.maximum(np.array(divergences), 0.0)  # rounding can make it slightly negative
        n = len(kl)
        return Fidelity(
            n_tokens=n,
            kl_mean=float(kl.mean()),
            kl_error=float(kl.std() / math.sqrt(n)),
            kl_p99=float(np.quantile(kl, 0.99)),
            same_top=n_same / n,
            perplexity=math.exp(loss / n),
            reference_perplexity=self.perplexity,
        )


def log_softmax(row: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return the log-probabilities `[V]` of logits `[V]`."""
    shifted = row - row.max()
    return np.asarray(shifted - np.float32(math.log(float(np.exp(shifted).sum()))), np.float32)


def _replies(reader: Reader, text: Text) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
    """Yield each token of the reply, with the logits that predict it."""
    rows = reader.logit_rows(text.tokens, max(text.n_prompt, 1))
    yield from zip(text.tokens[max(text.n_prompt, 1) :], rows, strict=True)
