"""What a gate asks for, and the paired comparison of answers against counting every outcome."""

from __future__ import annotations

import itertools

import pytest

from deepdistill.errors import UsageError
from deepdistill.quantize.measure.gate import Gate
from deepdistill.quantize.measure.paired import compare, interval, mcnemar


def test_every_condition_has_to_hold() -> None:
    gate = Gate.parse("accuracy >= 0.98 of bf16, loops <= 1%,kl<0.05")
    assert gate.needs_answers
    assert str(gate) == "accuracy >= 0.98 of bf16, loops <= 0.01, kl < 0.05"
    reference = {"accuracy": 0.5, "kl": 0.0}
    assert gate.failures({"accuracy": 0.49, "loops": 0.01, "kl": 0.049}, reference) == []
    assert gate.failures({"accuracy": 0.489, "loops": 0.02, "kl": 0.05}, reference) == [
        "accuracy is 0.489, not >= 0.49",
        "loops is 0.02, not <= 0.01",
        "kl is 0.05, not < 0.05",
    ]


def test_what_was_not_measured_never_passes() -> None:
    assert not Gate.parse("kl <= 1").needs_answers
    with pytest.raises(UsageError, check=lambda error: error.code == "not-measured" and "kl" in error.message):
        Gate.parse("kl <= 1").failures({"kl": None}, {})
    with pytest.raises(UsageError, check=lambda error: error.code == "not-measured"):
        Gate.parse("accuracy >= 0.9 of bf16").failures({"accuracy": 1.0}, {})


@pytest.mark.parametrize("text", ["", "accuracy", "speed >= 3", "kl == 1", "kl <= x", "kl <= 1; loops <= 1"])
def test_what_is_no_condition_is_refused(text: str) -> None:
    with pytest.raises(UsageError, check=lambda error: error.code == "bad-gate"):
        Gate.parse(text)


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
