from __future__ import annotations

import re

import pytest
import reasoning_gym
from chains import CHAINS, combine, final_answer
from hypothesis import given
from hypothesis import strategies as st
from train import TRAINING_PARAMS

from deepdistill.distill.pocket.families import check_source
from deepdistill.errors import TeacherError, UsageError

EQUALITY = re.compile(r"[-\d+*()]+(?:=[-\d+*()]+)+")


def check_every_equality(chain: str) -> None:
    """Python's own arithmetic is the reference: all sides of every equality are the same number."""
    for equality in EQUALITY.findall(chain):
        assert len({eval(side) for side in equality.split("=")}) == 1, equality


@pytest.mark.parametrize("family", CHAINS)
def test_chains_are_true_and_end_in_the_answer(family: str) -> None:
    chain_of = CHAINS[family]
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


@pytest.mark.parametrize(
    "source",
    [
        "gym:chain_sum?min_terms=2&max_terms=4&min_digits=1&max_digits=2",
        "gym:chain_sum?min_terms=3&max_terms=3&max_digits=1&size=5&seed=9",
        "gym:simple_geometry",
        "gym:count_bits?max_n=500",
    ],
)
def test_pocket_takes_what_it_has_learned(source: str) -> None:
    check_source(source)


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("gym:chain_sum", "max_terms=6"),  # reasoning-gym's own default
        ("gym:chain_sum?max_terms=4&max_digits=3", "max_digits=3"),
        ("gym:chain_sum?max_terms=4&max_digits=2&allow_negation=true", "allow_negation=True"),
        ("gym:gsm_symbolic", "gym:gsm_symbolic"),
        ("problems.jsonl", "problems.jsonl"),
    ],
)
def test_pocket_refuses_the_rest_and_says_what_it_answers(source: str, named: str) -> None:
    with pytest.raises(TeacherError) as caught:
        check_source(source)
    assert caught.value.code == "pocket-cannot-answer"
    assert named in caught.value.message
    assert "gym:chain_sum with min_terms 2 to 4" in caught.value.hint


def test_pocket_leaves_unknown_parameters_to_the_problems() -> None:
    with pytest.raises(UsageError) as caught:
        check_source("gym:chain_sum?min_term=2")
    assert "min_term" in caught.value.message
