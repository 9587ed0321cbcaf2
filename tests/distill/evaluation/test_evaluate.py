from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepdistill.distill.evaluation.evaluate import is_loop, repeats, score, wilson_interval
from deepdistill.localrun.core.generation import Completion

DONE = Completion("42", "6*7=42", True, "stop", 10, 5, 3, 0.1, (1, 2, 3, 4, 5))


@pytest.mark.parametrize(("right", "n"), [(0, 10), (27, 200), (100, 200), (200, 200)])
def test_wilson_interval_solves_its_own_equation(right: int, n: int) -> None:
    # The interval's ends are the shares p whose normal test just accepts the observed share x:
    # (x - p)^2 = z^2 p(1-p)/n.
    for p in wilson_interval(right, n):
        if 1e-9 < p < 1 - 1e-9:
            assert abs(right / n - p) == pytest.approx(1.959964 * math.sqrt(p * (1 - p) / n))


def naive_repeats(tokens: list[int]) -> bool:
    for period in range(1, len(tokens) + 1):
        times = 0
        while (times + 1) * period <= len(tokens):
            start = len(tokens) - (times + 1) * period
            if tokens[start : start + period] != tokens[len(tokens) - period :]:
                break
            times += 1
        whole = times * period
        # and the part of one more n-gram before it
        while whole < len(tokens) and tokens[len(tokens) - whole - 1] == tokens[len(tokens) - whole - 1 + period]:
            whole += 1
        if times >= 3 and whole >= 64:
            return True
    return False


@given(
    st.lists(st.integers(0, 2), max_size=30), st.lists(st.integers(0, 2), min_size=1, max_size=9), st.integers(0, 40)
)
def test_loops_are_found_as_a_naive_search_finds_them(head: list[int], gram: list[int], times: int) -> None:
    tokens = head + gram * times
    assert repeats(tokens) == naive_repeats(tokens)


def test_a_loop_must_be_long_and_at_the_end() -> None:
    assert repeats([7] * 64)
    assert not repeats([7] * 63)
    assert not repeats([7] * 64 + [1, 2])
    assert repeats(list(range(30)) * 3)
    assert not repeats(list(range(40)) * 2)


def test_reaching_the_limit_without_an_answer_is_a_loop() -> None:
    assert is_loop(replace(DONE, content="", finish_reason="length"))
    assert not is_loop(replace(DONE, finish_reason="length"))
    assert not is_loop(DONE)


def test_score_counts_failed_requests_as_wrong_and_closure_only_where_thinking_opened() -> None:
    open_ended = replace(DONE, closed=False, content="", finish_reason="length", completion_tokens=11)
    plain = replace(DONE, closed=None, reasoning_content=None)
    got = score([DONE, open_ended, plain], right=2, seconds=7.0, n_failed=1)
    assert (got.n, got.accuracy, got.closed, got.looped, got.n_failed) == (4, 0.5, 0.5, 0.25, 1)
    assert got.tokens_per_answer == pytest.approx(7)
    assert got.tokens_per_s == pytest.approx(3)
    assert score([plain], right=0, seconds=1.0).closed is None
