from __future__ import annotations

import hashlib

from hypothesis import given
from hypothesis import strategies as st

from deepdistill.distill.problems.split import bucket_of, normalise_question, question_id


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


def test_a_thousand_buckets_are_those_of_version_0_1_0() -> None:
    questions = [
        f"What is {i} plus {7 * i}? ²ﬁ½ Ünïcode\u00a0 {chr(0x400 + i % 64)}" if i % 3 else f"  Question {i}\n of\tmany "
        for i in range(1000)
    ]
    buckets = "".join(bucket_of(question)[:2] for question in questions)
    digest = "7f6c86949fd369491263d87dababce420db742e28638f00495ca2e40f67da9fa"  # printed by 0.1.0
    assert hashlib.sha256(buckets.encode()).hexdigest() == digest


def test_questions_that_mean_the_same_have_one_id() -> None:
    assert question_id("What is 52?") == question_id(" what  IS 52?") != question_id("What is 5²?")
    assert question_id("caf\u00e9") == question_id("cafe\u0301")


@given(st.text(min_size=1))
def test_case_and_white_space_do_not_move_a_question(text: str) -> None:
    assert bucket_of(text) == bucket_of(f"  {text}\n\t ") == bucket_of(normalise_question(text))


def test_shares() -> None:
    buckets = [bucket_of(str(i)) for i in range(20000)]
    assert abs(buckets.count("train") / 20000 - 0.80) < 0.01
    assert abs(buckets.count("validation") / 20000 - 0.05) < 0.01
    assert abs(buckets.count("test") / 20000 - 0.15) < 0.01
