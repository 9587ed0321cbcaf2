"""Prices, bounds and projections, with a clock that the test turns."""

from __future__ import annotations

import pytest

from deepdistill.distill.recipe.gathering import CostRecipe, Price, read_price
from deepdistill.distill.teachers.budget import Budget
from deepdistill.errors import UsageError
from deepdistill.localrun.core.generation import Completion
from deepdistill.localrun.core.settings import build


def paid(n_prompt: int, n_completion: int, lost: tuple[int, int] = (0, 0)) -> Completion:
    return Completion("", None, None, "stop", n_prompt, n_completion, 0, 0.0, lost_tokens=lost)


def test_a_price_is_dollars_a_million_tokens() -> None:
    assert Price(*read_price("0.5, 2")).of(1_000_000, 500_000) == 1.5


@pytest.mark.parametrize("text", ["", "1", "1,2,3", "a,b", "-1,2", "nan,1", "inf,1"])
def test_what_is_no_price_is_said(text: str) -> None:
    with pytest.raises(UsageError, check=lambda error: error.code == "bad-settings"):
        build(CostRecipe, {"price": text})


def test_a_bound_in_dollars_needs_a_price() -> None:
    with pytest.raises(UsageError, check=lambda error: error.code == "price-missing"):
        CostRecipe(max_usd=1.0)


def test_what_is_in_flight_counts_against_the_bound() -> None:
    budget = Budget(CostRecipe(price=(0, 1e6), max_usd=10.0))  # a dollar a token
    assert budget.why_stop(1000) is None, "nothing is known yet of what a sample costs"
    assert budget.why_stop(0, most_tokens=99) is None, "one may always be asked for"
    assert budget.why_stop(1, most_tokens=9) is None
    assert budget.why_stop(1, most_tokens=10), "until something is known each may take its limit"
    assert [budget.record(paid(5, 2)), budget.record(paid(5, 2))] == [2.0, 2.0]
    assert budget.why_stop(2, most_tokens=10) is None  # 4 spent, 4 on the way
    assert "10" in (budget.why_stop(3) or "")


def test_what_was_spent_before_counts_too() -> None:
    assert Budget(CostRecipe(price=(1, 1), max_usd=2.0), spent_usd=1.9).why_stop(0) is None
    assert Budget(CostRecipe(price=(1, 1), max_usd=2.0), spent_usd=2.0).why_stop(0)


def test_attempts_that_broke_off_are_paid_for_too() -> None:
    assert Budget(CostRecipe(price=(1e6, 2e6))).record(paid(1, 10, (2, 20))) == 63.0


def test_a_judge_has_a_price_of_its_own() -> None:
    limits = CostRecipe(price=(1, 2))
    assert limits.price_of_judge("http://a/v1", "http://a/v1") == Price(1, 2)
    assert limits.price_of_judge("http://b/v1", "http://a/v1") == Price(1, 2), "not known: it may cost as much"
    assert limits.price_of_judge("judge.gguf", "http://a/v1") == Price(0, 0), "in this process"
    assert CostRecipe().price_of_judge("judge.gguf", "http://a/v1") is None
    own = CostRecipe(price=(1, 2), judge_price=(3, 4))
    assert own.price_of_judge("http://b/v1", "http://a/v1") == Price(3, 4)


def test_the_hours_are_a_command_s() -> None:
    now = 0.0
    budget = Budget(CostRecipe(max_hours=0.5), clock=lambda: now)
    now = 1799.0
    assert budget.why_stop(8) is None
    now = 1800.0
    assert "--max-hours" in (budget.why_stop(0) or "")


def test_twenty_samples_tell_what_all_of_them_come_to() -> None:
    now = 0.0
    budget = Budget(CostRecipe(price=(1, 10)), spent_usd=3.0, clock=lambda: now)
    for _ in range(19):
        budget.record(paid(100, 1000))
    assert budget.project(80) is None
    budget.record(paid(80, 900, (20, 100)))
    now = 36.0
    whole = budget.project(80)
    assert whole is not None
    assert (whole.n_prompt, whole.n_completion) == (10_000, 100_000)
    assert whole.usd == pytest.approx(3.0 + 100 * (100 + 10_000) / 1e6)
    assert whole.hours == pytest.approx(0.05)
    assert str(whole) == "110 k tokens, $4.01, 3 min"
