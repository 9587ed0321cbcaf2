"""What a gate asks for, and the paired comparison of answers against counting every outcome."""

from __future__ import annotations

import pytest

from deepdistill.errors import UsageError
from deepdistill.quantize.measure.gate import Gate


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


def test_a_share_of_nothing_is_no_pass() -> None:
    condition = Gate.parse("accuracy >= 0.98 of bf16").conditions[0]
    assert "says nothing" in str(condition.check({"accuracy": 0.0}, {"accuracy": 0.0}))
