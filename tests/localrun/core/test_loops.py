"""What a loop is, against a naive search; and that a text under way is judged at every token as a whole one is."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deepdistill.localrun.core.loops import Loop, LoopDetector, VarietyGauge, find_loop

relaxed = settings(deadline=None, database=None, suppress_health_check=list(HealthCheck))


def naive_period(tokens: list[int]) -> int | None:
    """Return the shortest period of the loop that the text ends in, by its definition."""
    for period in range(1, len(tokens) // 3 + 1):
        tail = tokens[-max(64, 3 * period) :]
        if len(tail) == max(64, 3 * period) and tail[period:] == tail[:-period]:
            return period
    return None


@relaxed
@given(
    st.lists(st.integers(0, 2), max_size=30), st.lists(st.integers(0, 2), min_size=1, max_size=9), st.integers(0, 40)
)
def test_loops_are_found_as_a_naive_search_finds_them(head: list[int], gram: list[int], times: int) -> None:
    tokens = head + gram * times
    loop = find_loop(tokens)
    assert (loop and loop.period) == naive_period(tokens)


def test_a_loop_must_be_long_and_at_the_end() -> None:
    assert find_loop([7] * 64) == Loop(0, 1)
    assert find_loop([7] * 63) is None
    assert find_loop([7] * 64 + [1, 2]) is None
    assert find_loop(list(range(30)) * 3) == Loop(0, 30)
    assert find_loop(list(range(40)) * 2) is None
    assert find_loop([]) is None


def test_a_loop_is_found_where_it_began() -> None:
    loop = find_loop([1, 2, 3, *[7, 8, 9] * 30])
    assert loop == Loop(3, 3)
    assert loop.first_repeat == 6


@pytest.mark.parametrize("seed", range(4))
def test_a_loop_cannot_be_longer_than_it_is_said_to_be(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(60):
        unit = [rng.randint(0, 3) for _ in range(rng.randint(1, 40))]
        text = [rng.randint(0, 9) for _ in range(rng.randint(0, 50))] + unit * (90 // len(unit) + 3)
        loop = find_loop(text)
        assert loop is not None
        tail, before = text[loop.start :], loop.start - 1
        assert tail[loop.period :] == tail[: -loop.period]
        assert before < 0 or text[before] != text[before + loop.period]


@relaxed
@given(st.lists(st.integers(0, 3), max_size=80), st.integers(1, 70), st.integers(1, 12))
def test_a_loop_is_noticed_as_soon_as_the_definition_says(head: list[int], period: int, more: int) -> None:
    text = head + [(7 * i) % period + 10 for i in range(period)] * (more + 3)
    detector = LoopDetector()
    for end in range(1, len(text) + 1):
        assert detector.add(text[end - 1]) == naive_period(text[:end])


@pytest.mark.parametrize("seed", range(12))
def test_repetition_within_the_repeated_part_and_before_it_hides_no_loop(seed: int) -> None:
    """Stretches of one token, phrases said twice, and the looping part itself said before, in any order."""
    rng = random.Random(seed)
    alphabet = rng.choice([2, 3, 50])
    parts = [[rng.randrange(alphabet) for _ in range(rng.randrange(40))] * rng.choice([1, 1, 2]) for _ in range(4)]
    parts += [[rng.randrange(alphabet)] * rng.randrange(60) for _ in range(2)]
    text = [token for _ in range(5) for token in rng.choice(parts)]
    text += [token for _ in range(3) for token in rng.choice(parts)][:150] * 4
    detector = LoopDetector()
    for end in range(1, len(text) + 1):
        assert detector.add(text[end - 1]) == naive_period(text[:end])


def test_a_text_that_is_forgotten_counts_no_more() -> None:
    detector = LoopDetector()
    assert [detector.add(7) for _ in range(64)] == [None] * 63 + [1]
    detector.reset()
    assert [detector.add(7) for _ in range(64)] == [None] * 63 + [1]


@relaxed
@given(st.lists(st.integers(0, 90), min_size=200, max_size=700), st.integers(1, 90))
def test_variety_is_counted_over_a_window(tokens: list[int], n_different: int) -> None:
    tokens = [token % n_different for token in tokens]
    gauge = VarietyGauge()
    for end in range(1, len(tokens) + 1):
        window = tokens[max(0, end - 256) : end]
        assert gauge.add(tokens[end - 1]) == (len(window) == 256 and len(set(window)) < 76.8)
