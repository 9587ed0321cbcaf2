"""Read a model's tokens as text: bytes to characters to thinking and answer, one token at a time, at linear cost."""

from __future__ import annotations

import codecs
from collections.abc import Callable

from ..families.thinking import THINK, Part, Tags, ThinkingParser


class Reading:
    """What one sequence has said so far.

    `n_reasoning` counts the tokens up to and including the one that closes the thinking; 0 if it never opened.
    """

    def __init__(self, starts_inside: bool, piece: Callable[[int], bytes], tags: Tags = THINK) -> None:
        """Read tokens whose bytes `piece` gives."""
        self._piece = piece
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")  # characters may be split over tokens
        self._parser = ThinkingParser(starts_inside, tags)
        self._texts: dict[Part, list[str]] = {"thinking": [], "answer": []}
        self._n_before_close = 0
        self._has_answer = False

    def add(self, token: int) -> list[tuple[Part, str]]:
        """Return the text that a token lets out, in order, as (part, text)."""
        self._n_before_close += not self._parser.closed
        return self._keep(self._parser.feed(self._decoder.decode(self._piece(token))))

    def finish(self) -> list[tuple[Part, str]]:
        """Return what was held back, at the end of the stream."""
        return self._keep(self._parser.feed(self._decoder.decode(b"", final=True)) + self._parser.finish())

    def forbid_tags(self) -> None:
        """Take tags out of the answer too, from now on."""
        self._parser.forbid_tags()

    def _keep(self, pieces: list[tuple[Part, str]]) -> list[tuple[Part, str]]:
        for part, text in pieces:
            self._texts[part].append(text)
            self._has_answer = self._has_answer or (part == "answer" and not text.isspace())
        return pieces

    @property
    def part(self) -> Part:
        """The part that the next token belongs to, as far as is known."""
        return self._parser.part

    @property
    def decided(self) -> bool:
        """Whether there was enough text to tell if the output begins with thinking."""
        return self._parser.decided

    @property
    def has_answer(self) -> bool:
        """Whether the answer holds more than white space."""
        return self._has_answer

    @property
    def n_reasoning(self) -> int:
        """How many tokens the thinking took, its tags included."""
        return self._n_before_close if self._parser.opened else 0

    @property
    def closed(self) -> bool | None:
        """Whether the thinking was closed; None if it never opened."""
        return self._parser.closed if self._parser.opened else None

    @property
    def reasoning(self) -> str | None:
        """The thinking; None if it never opened."""
        return "".join(self._texts["thinking"]) if self._parser.opened else None

    @property
    def content(self) -> str:
        """The answer."""
        return "".join(self._texts["answer"])
