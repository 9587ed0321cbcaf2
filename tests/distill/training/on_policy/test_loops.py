"""The loop that a text ends in, and the row that teaches not to go on with it."""

from __future__ import annotations

import random

import pytest

from deepdistill.distill.evaluation.evaluate import repeats
from deepdistill.distill.training.on_policy.loops import find_loop, negative_row


def test_the_loop_is_found_where_it_began() -> None:
    loop = find_loop([1, 2, 3, *[7, 8, 9] * 30])
    assert loop is not None
    assert (loop.start, loop.period, loop.first_repeat) == (3, 3, 6)
    assert find_loop([1, 2, 3, *[7, 8, 9] * 20]) is None  # 60 tokens may be meant
    assert find_loop(list(range(200))) is None


@pytest.mark.parametrize("seed", range(8))
def test_a_text_has_a_loop_where_evaluation_counts_one(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(60):
        period = rng.randint(1, 40)
        unit = [rng.randint(0, 3) for _ in range(period)]
        text = [rng.randint(0, 9) for _ in range(rng.randint(0, 50))] + unit * rng.randint(1, 90 // period + 2)
        loop = find_loop(text)
        assert (loop is not None) == repeats(text)
        if loop is not None:
            tail = text[loop.start :]
            assert all(tail[i] == tail[i + loop.period] for i in range(len(tail) - loop.period))
            before = loop.start - 1
            assert before < 0 or text[before] != text[before + loop.period]


def test_only_what_repeats_is_a_negative() -> None:
    text = [4, 5, *[7, 8] * 100]
    loop = find_loop(text)
    assert loop is not None
    row = negative_row([1, 2, 3], text, loop)
    assert row.losses == (("unlikelihood", 1.0),)
    assert list(row.input_ids[:9]) == [1, 2, 3, 4, 5, 7, 8, 7, 8]
    assert row.weights is not None
    assert row.weights[:6] == [0, 0, 0, 0, 1, 1]
    assert sum(row.weights) == 64  # its beginning is enough
    assert len(row.weights) == row.n_targets
