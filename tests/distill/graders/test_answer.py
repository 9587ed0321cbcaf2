"""Which final answer is read out of a content."""

from __future__ import annotations

import pytest

from deepdistill.distill.graders.answer import final_answer, is_number


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("42", "42"),
        ("First 12, then 30, so 42.", "42"),
        (r"Thus \boxed{42}, not 43", "42"),
        (r"\boxed{1} no, \boxed{7}", "7"),
        (r"\boxed{42 \text{ legs}}", "42"),
        ("<answer>12 + 30 = 42</answer> of 50", "42"),
        ("The answer is 42 legs, since 40 + 2 is.", "42"),
        ("**Answer:** $1,234$", "1234"),
        ("The final answer is: **-7**.", "-7"),
        ("it is −5.", "-5"),
        ("Answer: x+1", "x+1"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        ("The answer is 3.5. It took 2 steps.", "3.5"),
        ("no number at all", None),
        ("", None),
        ("  \n ", None),
    ],
)
def test_final_answer_of_a_numeric_problem(content: str, expected: str | None) -> None:
    assert final_answer(content, numeric=True) == expected


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("Some steps.\n\nParis.\n", "Paris"),
        ("The answer is Paris. It lies on the Seine.", "Paris"),
        (r"so \boxed{\frac{1}{2}} it is", r"\frac{1}{2}"),
        ("<answer>\nno\n</answer>", "no"),
        (r"\boxed{\frac{1}{2", r"\boxed{\frac{1}{2"),
        ("", None),
    ],
)
def test_final_answer_of_a_text_problem(content: str, expected: str | None) -> None:
    assert final_answer(content, numeric=False) == expected


def test_final_answer_keeps_all_lines_where_lines_are_asked_for() -> None:
    assert final_answer("1 2\n3 4\n", numeric=False, multiline=True) == "1 2\n3 4"


@pytest.mark.parametrize(("text", "expected"), [("-42", True), ("1,000.5", True), ("1/2", False), ("4 legs", False)])
def test_is_number(text: str, expected: bool) -> None:
    assert is_number(text) is expected
