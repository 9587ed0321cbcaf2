"""Sizes, durations, lists and errors read as people write them."""

from __future__ import annotations

import math

import pytest

from deepdistill.localrun.core.text import first_line, format_bytes, format_duration, listed, shorten, sparkline


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (3_210, "3.2 kB"),
        (48_000, "48 kB"),
        (2_340_000, "2.3 MB"),
        (144_812_128, "145 MB"),
        (999_400_000, "999 MB"),
        (4_130_000_000, "4.1 GB"),
        (1_342_000_000_000, "1,342.0 GB"),
    ],
)
def test_bytes_are_decimal_and_short(n: int, text: str) -> None:
    assert format_bytes(n) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (119, "119 s"), (720, "12 min"), (12_600, "3.5 h"), (432_000, "120 h")]
)
def test_a_duration_has_one_unit(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("error", "text"), [(ValueError("\n one \n two"), "one"), (ValueError(" "), "ValueError"), (KeyError(), "KeyError")]
)
def test_an_error_of_many_lines_gives_its_first(error: Exception, text: str) -> None:
    assert first_line(error) == text


def test_a_text_is_shortened_to_one_safe_line() -> None:
    assert shorten("one\n two\x1b[2J", 40) == "one two�[2J"
    assert shorten("word " * 100, 10) == "word word…"


@pytest.mark.parametrize(
    ("items", "most", "text"),
    [
        ([], None, ""),
        (["a"], None, "a"),
        (["a", "b"], None, "a and b"),
        ([1, 2, 3], None, "1, 2 and 3"),
        (list("abcde"), 2, "a, b and 3 more"),
        (list("ab"), 2, "a and b"),
    ],
)
def test_a_list_ends_with_and(items: list[object], most: int | None, text: str) -> None:
    assert listed(items, most=most) == text


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ([], ""),
        ([3.0], "▁"),
        ([5.0, 5.0], "▁▁"),
        ([0, 1, 2, 3, 4, 5, 6], "▁▂▃▄▅▆▇"),
        ([7.5, -4.5], "▇▁"),
        ([2.0, math.nan, 1.0, math.inf], "▇▁"),
    ],
)
def test_a_sparkline_spans_lowest_to_highest(values: list[float], line: str) -> None:
    assert sparkline(values) == line
