"""Thinking and answer come apart the same way wherever the stream is cut."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deepdistill.localrun.families.thinking import (
    CLOSE,
    OPEN,
    Part,
    ThinkingParser,
    prompt_opens_thinking,
    split_thinking,
)

# A busy machine is no reason to fail.
relaxed = settings(deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])

# Text that is rich in tags, parts of tags and newlines, where cuts hurt.
TAGGED = st.lists(
    st.sampled_from([OPEN, CLOSE, "<", "</", "</thi", "think>", "\n", "\n\n", " ", "a", "é", "=7", "<b>", "🦙"]),
    max_size=12,
).map("".join)
PLAIN = st.text(st.sampled_from("ab<>/ \nthink7é🦙")).filter(lambda text: "think>" not in text)


def join(pieces: list[tuple[Part, str]], part: Part) -> str:
    return "".join(text for kind, text in pieces if kind == part)


def reference(text: str, starts_inside: bool) -> tuple[str | None, str, bool | None]:
    """Split a whole text with one regular expression each: what the stream has to agree with."""
    repeated = re.match(rf"\s*{OPEN}", text)
    if not repeated and not starts_inside:
        return None, text, None
    body = text[repeated.end() :] if repeated else text
    body = re.sub(r"\A\n", "", body)
    found = re.search(rf"\n?{CLOSE}\n*", body)
    if not found:
        return re.sub(r"\n\Z", "", body), "", False
    return body[: found.start()], body[found.end() :], True


@relaxed
@given(TAGGED, st.booleans())
def test_split_agrees_with_the_reference(text: str, starts_inside: bool) -> None:
    assert split_thinking(text, starts_inside) == reference(text, starts_inside)


@relaxed
@given(TAGGED, st.booleans(), st.lists(st.integers(0, 60)))
def test_cuts_never_change_the_result(text: str, starts_inside: bool, cuts: list[int]) -> None:
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    parser = ThinkingParser(starts_inside)
    pieces = [piece for start, end in pairwise(edges) for piece in parser.feed(text[start:end])] + parser.finish()
    reasoning, content, closed = split_thinking(text, starts_inside)
    assert join(pieces, "thinking") == (reasoning or "")
    assert join(pieces, "answer") == content
    assert (parser.closed if parser.opened else None) == closed
    assert "" not in [text for _, text in pieces]
    assert [part for part, _ in pieces] == sorted((part for part, _ in pieces), reverse=True), "the answer comes last"


@relaxed
@given(PLAIN.filter(lambda text: not text.startswith("\n")), PLAIN.filter(lambda text: not text.startswith("\n")))
def test_what_the_template_renders_comes_back_and_no_tag_leaks(reasoning: str, content: str) -> None:
    rendered = f"{reasoning}\n{CLOSE}\n\n{content}"
    assert split_thinking(f"{OPEN}\n{rendered}", False) == (reasoning, content, True)
    assert split_thinking(rendered, True) == (reasoning, content, True)
    parser = ThinkingParser(True)
    pieces = [piece for character in rendered for piece in parser.feed(character)] + parser.finish()
    assert (join(pieces, "thinking"), join(pieces, "answer")) == (reasoning, content)
    assert parser.opened
    assert parser.closed


def test_nothing_is_held_longer_than_a_tag() -> None:
    parser = ThinkingParser(True)
    assert parser.feed("3+4=7 < 9") == [("thinking", "3+4=7 < 9")]
    assert parser.feed("\n</th") == []
    assert parser.feed("ese") == [("thinking", "\n</these")]
    assert parser.part == "thinking"
    assert not parser.closed
    assert parser.feed(f"{CLOSE}\n\n") == []
    assert parser.part == "answer"
    assert parser.closed
    assert parser.feed("7") == [("answer", "7")]


@pytest.mark.parametrize(
    ("prompt", "opens"),
    [
        ("<|im_start|>assistant\n<think>\n", True),
        ("<|im_start|>assistant\n<think>", True),
        ("<|im_start|>assistant\n", False),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", False),
        ("what does <think> mean?<|im_end|>\n<|im_start|>assistant\n", False),
    ],
)
def test_prompt_tells_whether_thinking_is_open(prompt: str, opens: bool) -> None:
    assert prompt_opens_thinking(prompt) is opens


def test_unclosed_and_unopened() -> None:
    assert split_thinking("1+1=2\n1+2=", True) == ("1+1=2\n1+2=", "", False)
    assert split_thinking("the tag </think> closes", False) == (None, "the tag </think> closes", None)
    assert split_thinking(f"{OPEN}\n{CLOSE}\n\n7", True) == ("", "7", True)
