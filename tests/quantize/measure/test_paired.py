"""The paired comparison of answers against counting every outcome."""

from __future__ import annotations

import itertools

import pytest

from deepdistill.quantize.measure.paired import compare, interval, mcnemar


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (1, 0), (5, 1), (3, 3), (2, 8)])
def test_mcnemar_counts_every_way_the_coins_may_fall(lost: int, gained: int) -> None:
    n, seen = lost + gained, abs(lost - gained)
    as_lopsided = sum(abs(2 * sum(coins) - n) >= seen for coins in itertools.product((0, 1), repeat=n))
    assert mcnemar(lost, gained) == pytest.approx(as_lopsided / 2**n)


def test_answers_are_paired_problem_by_problem() -> None:
    before, after = [True, True, True, False, False], [True, False, False, True, False]
    found = compare(before, after)
    assert (found.n, found.lost, found.gained, found.difference) == (5, 2, 1, -0.2)
    assert found.interval[0] < -0.2 < found.interval[1]
    assert interval(0, 0, n=500)[1] == pytest.approx(-interval(0, 0, n=500)[0])
    assert interval(10, 10, n=500)[1] < 0.02
    with pytest.raises(ValueError, match="cannot be paired"):
        compare(before, after[:4])


def test_mcnemar_of_more_flips_than_a_float_has_powers_of_two() -> None:
    assert mcnemar(600, 600) == 1.0
    assert 0 < mcnemar(500, 700) < 1e-7
