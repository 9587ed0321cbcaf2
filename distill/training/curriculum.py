"""The order of the rows, by how often the untrained student solves their problems.

A problem that it nearly always solves teaches little, and trains in some of the epochs only. One that it solves now and
then teaches most, and trains twice per epoch from the second on. Training begins with rows of such problems; those that
the student never solves follow soon. They must not come late: a training with a time limit may not see every row once,
and most of what there is to learn is in them.

If the student tried only some of the problems, the row of another takes the mean pass rate of the tried rows nearest to
it in length: the longer the reasoning, the harder the problem.

Source: difficulty by the model's own pass rate, as Kimi k1.5 (arXiv 2501.12599, section 2.3) and others sample prompts.
"""

from __future__ import annotations

import bisect
import random
from collections.abc import Sequence
from typing import Literal

from ..recipe.training import CurriculumRecipe, TrainingRecipe
from .rows import Row, order_rows

Level = Literal["easy", "middle", "hopeless"]


def level_of(rate: float | None, settings: CurriculumRecipe) -> Level:
    """Return the level of a pass rate; a problem that was never tried counts as middle."""
    if rate is None:
        return "middle"
    if rate >= settings.easy_from:
        return "easy"
    return "middle" if rate > 0 else "hopeless"


def estimated(rows: Sequence[tuple[Row, float | None]], nearest: int = 8) -> list[tuple[Row, float | None]]:
    """Return the rows, with the mean pass rate of the `nearest` tried rows in length for those not tried.

    The rates stay None if no row was tried.
    """
    tried = sorted((len(row.input_ids), rate) for row, rate in rows if rate is not None)
    if not tried:
        return list(rows)
    lengths = [length for length, _ in tried]

    def rate_at(length: int) -> float:
        start = min(max(bisect.bisect(lengths, length) - nearest // 2, 0), max(len(tried) - nearest, 0))
        rates = [rate for _, rate in tried[start : start + nearest]]
        return sum(rates) / len(rates)

    return [(row, rate_at(len(row.input_ids)) if rate is None else rate) for row, rate in rows]


def arrange(rows: Sequence[tuple[Row, float | None]], training: TrainingRecipe) -> list[Row]:
    """Return the rows of every epoch in order, given each with its problem's pass rate.

    The first epoch begins with middle rows, at most `head_start` of all rows; then all levels are mixed. If no problem
    was tried, or none was ever solved, this is the plain order.
    """
    settings, batch_size, seed = training.curriculum, training.batch_size, training.seed or 0
    if all(rate is None for _, rate in rows):
        return order_rows([row for row, _ in rows], batch_size, epochs=training.epochs, seed=seed)
    levels = ("easy", "middle", "hopeless")
    easy, middle, hopeless = ([row for row, rate in rows if level_of(rate, settings) == level] for level in levels)
    rng = random.Random(seed)
    ordered: list[Row] = []
    for epoch in range(training.epochs):
        some_easy = rng.sample(easy, round(settings.easy_share * len(easy)))
        if epoch == 0:
            first = rng.sample(middle, len(middle))
            n_first = min(len(first), round(settings.head_start * len(rows))) if hopeless else 0
            parts = [first[:n_first], first[n_first:] + some_easy + hopeless]
        else:
            parts = [middle * settings.middle_times + some_easy + hopeless]
        for i, part in enumerate(parts):
            ordered += order_rows(part, batch_size, epochs=1, seed=seed + 2 * epoch + i) if part else []
    return ordered


def counts(rates: Sequence[float | None], settings: CurriculumRecipe | None = None) -> dict[str, int]:
    """Return how many problems there are on each level."""
    levels = [level_of(rate, settings or CurriculumRecipe()) for rate in rates]
    return {level: levels.count(level) for level in ("easy", "middle", "hopeless")}
