"""Agreement: what is the same answer, when a majority is accepted, and that no order or name changes it."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepdistill.distill.judging.vote import answer_key, vote, vote_on_traces
from deepdistill.distill.recipe.gathering import VoteRecipe
from deepdistill.distill.records import Judgement, TeacherInfo, Trace, Usage, Verdict
from deepdistill.localrun.core.generation import FinishReason


def ids(*answers: str | None) -> dict[str, str | None]:
    return {f"s{i}": answer for i, answer in enumerate(answers)}


def elected(*answers: str | None, settings: VoteRecipe | None = None, same: Any = None) -> list[int]:
    """Return the places of the samples that gave the elected answer."""
    return [i for i, one in enumerate(vote(ids(*answers), settings, same)) if one.verdict_by == "vote"]


def test_the_majority_is_elected() -> None:
    assert elected("7", "8", "7", " 7.0 ", "9") == [0, 2, 3]
    judged = vote(ids("7", "8", "7", " 7.0 ", None))
    assert [one.agreement for one in judged] == [0.6, 0.2, 0.6, 0.6, None]


@pytest.mark.parametrize(
    "answers",
    [
        (),
        ("7",),  # one sample agrees with nobody
        (None, None),
        ("7", None),
        ("1", "2", "3"),
        ("1", "1", "2", "2"),
        ("7", "7", "8", "9"),  # 0.5
        ("7", "7", None, None),  # those without an answer count as samples
    ],
)
def test_without_enough_agreement_nothing_is_accepted(answers: tuple[str | None, ...]) -> None:
    assert elected(*answers) == []


def test_the_share_is_reached_exactly() -> None:
    assert elected(*["7"] * 3, "8", "9") == [0, 1, 2], "3 of 5 is 0.6"
    assert elected(*["7"] * 7, *"123", settings=VoteRecipe(min_share=0.7)) == [*range(7)]
    assert elected(*["7"] * 6, *"1234", settings=VoteRecipe(min_share=0.7)) == []


def test_a_tie_is_no_majority_however_low_the_share_is_set() -> None:
    low = VoteRecipe(min_share=0.1)
    assert elected("1", "1", "2", "2", "3", settings=low) == []
    assert elected("1", "1", "2", "2", "1", settings=low) == [0, 1, 4]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("1,000", "1000.0"),
        ("$1000$", "1000"),
        ("\\boxed{42}", "42"),
        ("**Paris**", "paris."),
        ("1/2", "0.5"),
        ("\\frac{3}{6}", ".5"),
        ("−3", "-3"),
        ("1e3", "1000"),
        ("x  +  1", "X + 1"),
        ("\\text{blue}", "Blue"),
        ("\\(7\\)", "7"),
        ("+5", "5"),
        ("７", "7"),
    ],
)
def test_the_same_answer_otherwise_written(one: str, other: str) -> None:
    assert answer_key(one) == answer_key(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("7", "-7"),
        ("50%", "50"),
        ("1,2", "12"),
        ("7", "7 m"),
        ("0.1", "0.10001"),
        ("a", "b"),
        ("1/0", "0"),
        ("e3", "1000"),
    ],
)
def test_other_answers(one: str, other: str) -> None:
    assert answer_key(one) != answer_key(other)


def test_a_callable_may_know_more() -> None:
    def metres(one: str, other: str) -> bool:
        return {one, other} == {"1 km", "1000 m"}

    assert elected("1 km", "1000 m", "2 km") == []
    assert elected("1000 m", "1 km", "2 km", same=metres) == [0, 1]


ANSWERS = st.lists(st.sampled_from(["1", "1.0", "2", "two", "Two", None, "1/2", "0.5", ""]), max_size=9)


@settings(max_examples=200)
@given(ANSWERS, st.floats(0, 1), st.integers(1, 4), st.randoms())
def test_neither_order_nor_repetition_of_the_count_changes_it(
    answers: list[str | None], share: float, least: int, rng: object
) -> None:
    cast, rules = ids(*answers), VoteRecipe(share, least)
    judged = vote(cast, rules)
    shuffled = list(cast.items())
    rng.shuffle(shuffled)  # type: ignore[attr-defined]
    assert {one.id: one for one in vote(dict(shuffled), rules)} == {one.id: one for one in judged}
    assert vote(cast, rules, same=lambda a, b: False) == judged
    keys = {id_: None if answer is None else answer_key(answer) for id_, answer in cast.items()}
    counted = Counter(key for key in keys.values() if key is not None)
    for one in judged:
        assert one.agreement == (None if keys[one.id] is None else counted[keys[one.id]] / len(cast))
    favoured = {one.id for one in judged if one.verdict_by == "vote"}
    if not favoured:
        return
    (key,) = {keys[id_] for id_ in favoured}
    most = counted.most_common(2)
    assert key == most[0][0]
    assert len(most) < 2 or most[0][1] > most[1][1]
    assert len(favoured) == counted[key] >= least
    assert counted[key] / len(cast) >= share - 1e-9


@given(st.integers(-(10**9), 10**9), st.integers(1, 10**6))
def test_numbers_are_compared_exactly(over: int, under: int) -> None:
    assert answer_key(f"{over}/{under}") == Fraction(over, under)
    assert answer_key(f"{over:,}") == over


@given(st.text(max_size=40))
def test_any_text_has_a_key(text: str) -> None:
    assert answer_key(text) == answer_key(f"  {text}\n")


def trace(
    id_: str, answer: str | None, problem: str = "p", finish: FinishReason = "stop", verdict: Verdict = "unknown"
) -> Trace:
    return Trace(
        id=id_,
        problem_id=problem,
        messages=[{"role": "user", "content": "How many?"}],
        reasoning_content=None,
        content=answer or "",
        answer=answer,
        verdict=verdict,
        verdict_by="none" if verdict == "unknown" else "grader",
        finish_reason=finish,
        usage=Usage(1, 1, 0),
        teacher=TeacherInfo("toy", "endpoint"),
        sampling={},
        seconds=0.1,
    )


def test_traces_vote_problem_by_problem_and_only_the_finished_ones() -> None:
    said = [
        trace("a", "7"),
        trace("x", "blue", "q"),
        trace("b", "7"),
        trace("y", "red", "q"),
        trace("c", "7", finish="length"),
        trace("d", "  "),
    ]
    found = {judgement.id: judgement for judgement in vote_on_traces(said, VoteRecipe(min_share=0.5))}
    assert found == {
        "a": Judgement("a", "vote", 0.5),
        "b": Judgement("b", "vote", 0.5),
        "c": Judgement("c", "none", None),
        "d": Judgement("d", "none", None),
        "x": Judgement("x", "none", 0.5),
        "y": Judgement("y", "none", 0.5),
    }
    assert {j.verdict_by for j in vote_on_traces(said)} == {"none"}, "2 of 4 are less than 0.6: the cut ones count"


def test_what_a_grader_judged_is_not_voted_on() -> None:
    said = [trace("a", "7", verdict="right"), trace("b", "7", verdict="wrong"), trace("c", "7"), trace("d", "7")]
    assert {judgement.id for judgement in vote_on_traces(said)} == {"c", "d"}
