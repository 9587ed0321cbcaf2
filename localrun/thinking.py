"""Tell a model's thinking from its answer while both stream in, wherever the pieces are cut.

Tags never reach either text: what could be the start of a tag is held back until it is known not to be one. The newline
after the opening tag, the one before the closing tag and the blank lines after it belong to the tags.
"""

from __future__ import annotations

from typing import Literal

Part = Literal["thinking", "answer"]

OPEN, CLOSE = "<think>", "</think>"


def prompt_opens_thinking(prompt: str) -> bool:
    """Say whether a rendered prompt ends inside the thinking, so that the model's first token is a thought."""
    return prompt.rstrip().endswith(OPEN)


def split_thinking(text: str, starts_inside: bool) -> tuple[str | None, str, bool | None]:
    """Return (reasoning or None, content, closed) of a finished output; closed is None if thinking never opened."""
    parser = ThinkingParser(starts_inside)
    pieces = parser.feed(text) + parser.finish()
    thinking = "".join(piece for part, piece in pieces if part == "thinking")
    content = "".join(piece for part, piece in pieces if part == "answer")
    return (thinking if parser.opened else None), content, (parser.closed if parser.opened else None)


class ThinkingParser:
    """Split a stream of text into thinking and answer.

    Thinking opens at the very start of the output or not at all, and closes once: a tag that the answer quotes is text.
    A model that repeats the opening tag with which its prompt ended is forgiven.
    """

    def __init__(self, starts_inside: bool) -> None:
        self.opened = starts_inside
        self._state: Literal["start", "opened", "thinking", "closed", "answer"] = "start"
        self._held = ""

    @property
    def closed(self) -> bool:
        """Whether the thinking came to its end."""
        return self.opened and self._state in ("closed", "answer")

    @property
    def part(self) -> Part:
        """The part that the next text belongs to, as far as is known."""
        return "thinking" if self.opened and not self.closed else "answer"

    def feed(self, text: str) -> list[tuple[Part, str]]:
        """Return what the new text lets out, in order, as (part, text) with no empty text."""
        self._held += text
        out: list[tuple[Part, str]] = []
        if self._state == "start":
            self._look_for_open()
        if self._state == "opened" and self._held:
            self._held, self._state = self._held.removeprefix("\n"), "thinking"
        if self._state == "thinking" and (thought := self._take_thought()):
            out.append(("thinking", thought))
        if self._state == "closed":
            self._held = self._held.lstrip("\n")
            self._state = "answer" if self._held else "closed"
        if self._state == "answer" and self._held:
            out.append(("answer", self._held))
            self._held = ""
        return out

    def finish(self) -> list[tuple[Part, str]]:
        """Return what was held back, at the end of the stream."""
        held, self._held = self._held, ""
        if self.part == "thinking":
            held = held.removeprefix("\n") if self._state == "start" else held
            held = held.removesuffix("\n")
        return [(self.part, held)] if held else []

    def _look_for_open(self) -> None:
        """Decide whether the output begins with the opening tag, once there is enough of it."""
        text = self._held.lstrip()
        if text.startswith(OPEN):
            self.opened, self._state, self._held = True, "opened", text[len(OPEN) :]
        elif not OPEN.startswith(text):
            self._state = "opened" if self.opened else "answer"

    def _take_thought(self) -> str:
        """Take what is surely thinking out of the held text, up to the closing tag if that is there."""
        end = self._held.find(CLOSE)
        if end >= 0:
            thought, self._held = self._held[:end].removesuffix("\n"), self._held[end + len(CLOSE) :]
            self._state = "closed"
            return thought
        cut = len(self._held) - _n_held_back(self._held)
        thought, self._held = self._held[:cut], self._held[cut:]
        return thought


def _n_held_back(text: str) -> int:
    """Return how many last characters may yet turn out to be the closing tag or the newline before it."""
    ending = f"\n{CLOSE}"
    for length in range(min(len(ending), len(text)), 0, -1):
        if ending.startswith(text[-length:]) or CLOSE.startswith(text[-length:]):
            return length
    return 0
