from __future__ import annotations

import re

import pytest
import reasoning_gym
from hypothesis import given
from hypothesis import strategies as st

from deepdistill.distill.pocket.chains import FAMILIES, combine, final_answer
from deepdistill.distill.pocket.recipe import TRAINING_PARAMS

EQUALITY = re.compile(r"[-\d+*()]+(?:=[-\d+*()]+)+")


def check_every_equality(chain: str) -> None:
    """Python's own arithmetic is the reference: all sides of every equality are the same number."""
    for equality in EQUALITY.findall(chain):
        assert len({eval(side) for side in equality.split("=")}) == 1, equality


@pytest.mark.parametrize("family", FAMILIES)
def test_chains_are_true_and_end_in_the_answer(family: str) -> None:
    chain_of, _ = FAMILIES[family]
    for item in reasoning_gym.create_dataset(family, seed=11, size=300, **TRAINING_PARAMS[family]):
        chain = chain_of(item["metadata"])
        check_every_equality(chain)
        assert final_answer(chain) == item["answer"]


@given(st.integers(-500, 500), st.sampled_from("+-"), st.integers(0, 500))
def test_combine(a: int, operator: str, b: int) -> None:
    chain = combine(a, operator, b)
    check_every_equality(chain)
    assert int(final_answer(chain)) == (a + b if operator == "+" else a - b)
    assert max(len(number) for number in re.findall(r"\d+", chain)) <= 4
