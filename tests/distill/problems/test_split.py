from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from deepdistill.distill.problems.split import bucket_of, normalise_question


def test_the_split_never_changes() -> None:
    # Fixed for ever: moving a question to another bucket would leak old test questions into new training sets.
    assert bucket_of("State the final answer to the following arithmetic problem: 4 + 3 =") == "train"
    assert [bucket_of(f"question {i}") for i in range(12)] == [
        "train",
        "train",
        "train",
        "test",
        "train",
        "train",
        "train",
        "train",
        "test",
        "test",
        "train",
        "train",
    ]


@given(st.text(min_size=1))
def test_case_and_white_space_do_not_move_a_question(text: str) -> None:
    assert bucket_of(text) == bucket_of(f"  {text}\n\t ") == bucket_of(normalise_question(text))


def test_shares() -> None:
    buckets = [bucket_of(str(i)) for i in range(20000)]
    assert abs(buckets.count("train") / 20000 - 0.80) < 0.01
    assert abs(buckets.count("validation") / 20000 - 0.05) < 0.01
    assert abs(buckets.count("test") / 20000 - 0.15) < 0.01
