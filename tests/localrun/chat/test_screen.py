"""How an answer streams: thinking apart or folded, wide and narrow windows, foreign text, simple terminals."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from deepdistill.localrun.chat.screen import Screen, Thought
from deepdistill.localrun.chat.wrap import Flow
from deepdistill.localrun.engine.stream import Step
from deepdistill.localrun.families.thinking import Part

STYLES = re.compile(r"\x1b\[[0-9;]*m")
THINKING = "one two three four five"


def step(part: Part, text: str, n_reasoning: int) -> Step:
    return Step(1, text, part, 10, 10, n_reasoning, part == "answer", 100.0, 10.0)


def terminal(width: int = 40, **settings: bool) -> Console:
    return Console(file=io.StringIO(), width=width, force_terminal=True, color_system="standard", **settings)


def shown_by(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def visible(text: str) -> str:
    """Return what stays of a terminal's output: a carriage return and an erasure take a line away."""
    return re.sub(r"[^\n]*\r\x1b\[2K", "", STYLES.sub("", text))


def stream(screen: Screen, thinking: str = THINKING, answer: str = "the *answer*") -> None:
    for i, letter in enumerate(thinking):
        screen.show(step("thinking", letter, i + 1))
    for letter in answer:
        screen.show(step("answer", letter, len(thinking)))
    screen.end()


def test_thinking_is_wrapped_behind_a_bar_and_dim() -> None:
    console = terminal(width=15)
    stream(Screen(console))
    lines = visible(shown_by(console)).splitlines()
    assert lines[:2] == ["│ one two", "│ three four"]
    assert lines[-1] == "the answer"
    assert "\x1b[2mt" in shown_by(console)
    assert "\x1b[3manswer" in shown_by(console)


def test_folded_thinking_is_a_status_line_and_then_a_summary() -> None:
    console = terminal()
    stream(Screen(console, folded=True))
    assert "▸ thinking … 0.0 s, 1 tokens" in STYLES.sub("", shown_by(console))
    assert re.fullmatch(r"▸ thought for 0\.\d s, 23 tokens\nthe answer\n", visible(shown_by(console)))


def test_thinking_is_unfolded_and_folded_under_way() -> None:
    console = terminal()
    screen = Screen(console, folded=True)
    for i, word in enumerate(["one ", "two ", "three "]):
        screen.show(step("thinking", word, i + 1))
        if i < 2:
            screen.toggle()
    screen.show(step("answer", "x", 4))
    screen.end()
    assert re.fullmatch(r"│ one two\s*\n▸ thought for 0\.\d s, 4 tokens\nx\n", visible(shown_by(console)))
    assert screen.thought is not None
    assert screen.thought.text == "one two three "


def test_thinking_that_is_empty_leaves_no_trace() -> None:
    console = terminal()
    stream(Screen(console), thinking="\n\n", answer="hi")
    assert visible(shown_by(console)) == "hi\n"


def test_waiting_is_said_until_the_first_token() -> None:
    console = terminal()
    screen = Screen(console)
    screen.wait()
    assert "reading" in shown_by(console)
    stream(screen, thinking="", answer="hi")
    assert visible(shown_by(console)) == "hi\n"


def test_an_answer_stopped_in_the_middle_ends_its_line() -> None:
    for part in ("thinking", "answer"):
        console = terminal()
        screen = Screen(console)
        screen.show(step(part, "so far", 1))
        screen.end()
        assert visible(shown_by(console)).startswith("│ so far\n╰" if part == "thinking" else "so far\n")


@pytest.mark.parametrize("is_terminal", [False, True])
def test_no_escape_where_none_is_known(is_terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    console = Console(file=io.StringIO(), width=40, force_terminal=is_terminal)
    for folded in (False, True):
        stream(Screen(console, folded=folded))
    assert "\x1b" not in shown_by(console)
    assert "\r" not in shown_by(console)
    assert shown_by(console).count("the *answer*") == 2, "Markdown is written as it is"


def test_foreign_text_cannot_steer_the_terminal() -> None:
    console = terminal()
    stream(Screen(console), thinking="\x1b[2J\x1b]0;title\x07", answer="\x1b[2J**x**")
    assert STYLES.sub("", shown_by(console)).count("\x1b") == 0


@pytest.mark.parametrize("width", [3, 10, 21, 80])
def test_no_row_is_wider_than_the_window(width: int) -> None:
    console = terminal(width=width)
    text = "中文字符很长很长" * 3 + " 🦙🦙🦙🦙🦙🦙🦙 " + "x" * 50 + " short words e\u0301 here"
    flow = Flow(console)
    for letter in text:
        flow.write(letter)
    flow.end()
    rows = visible(shown_by(console)).splitlines()
    assert all(console.measure(row).maximum <= max(width, 8) for row in rows)
    assert "".join(rows).replace(" ", "") == text.replace(" ", "")


def test_a_window_made_narrow_under_way_is_wrapped_at_its_new_width() -> None:
    console = terminal(width=40)
    flow = Flow(console)
    flow.write("one two three four five\n")
    console.width = 12
    flow.write("one two three four five")
    flow.end()
    assert visible(shown_by(console)).splitlines() == ["one two three four five", "one two", "three four", "five"]


def test_a_thought_of_another_day_has_no_seconds() -> None:
    assert (str(Thought("x", 1200)), str(Thought("x", 2, 3.14))) == (
        "thought, 1,200 tokens",
        "thought for 3.1 s, 2 tokens",
    )
