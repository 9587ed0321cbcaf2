"""Separate a model's thinking from its answer while both stream in, wherever the pieces are cut.

Tags reach neither text: what could be the start of a tag is held back until it turns out not to be one. The newline
after the opening tag, the one before the closing tag and the blank lines after it belong to the tags.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal, NamedTuple

Part = Literal["thinking", "answer"]
Think = Literal["auto", "on", "off"]


class Tags(NamedTuple):
    """What a model writes around its thinking."""

    open: str
    close: str


OPEN, CLOSE = THINK = Tags("<think>", "</think>")
# As models' templates have them: DeepSeek, Qwen and most others; Kimi; Magistral; Seed; Hunyuan and others.
_KNOWN = (
    THINK,
    Tags("◁think▷", "◁/think▷"),
    Tags("[THINK]", "[/THINK]"),
    Tags("<seed:think>", "</seed:think>"),
    Tags("<thinking>", "</thinking>"),
    Tags("<reasoning>", "</reasoning>"),
    Tags("<|channel>thought", "<channel|>"),
    Tags("<|begin_of_thought|>", "<|end_of_thought|>"),
)
# gpt-oss writes channels; a server that drops special tokens leaves their names alone.
_HARMONY = re.compile(
    r"\s*(?:<\|channel\|>analysis<\|message\|>(?P<thought>.*?)(?:<\|end\|>|$))?"
    r"(?:<\|start\|>assistant)?(?:<\|channel\|>final<\|message\|>(?P<answer>.*?)(?:<\|return\|>|<\|end\|>|$))?",
    re.DOTALL,
)
_BARE_HARMONY = re.compile(r"analysis(?P<thought>.*?)assistantfinal(?P<answer>.*)", re.DOTALL)


def tags_of(metadata: Mapping[str, str]) -> Tags | None:
    """Return a GGUF's thinking tags from its metadata or else its chat template; None if neither names any."""
    named = metadata.get("deepdistill.think_open"), metadata.get("deepdistill.think_close")
    if named[0] and named[1]:
        return Tags(named[0], named[1])
    template = metadata.get("tokenizer.chat_template", "")
    return next((tags for tags in _KNOWN if tags.open in template or tags.close in template), None)


def prompt_opens_thinking(prompt: str, tags: Tags = THINK) -> bool:
    """Say whether a rendered prompt ends inside the thinking, so that the model's first token is a thought."""
    return prompt.rstrip().endswith(tags.open)


def prompt_closes_thinking(prompt: str, tags: Tags = THINK) -> bool:
    """Say whether a rendered prompt ends after the thinking, so that the model's first token is an answer."""
    return prompt.rstrip().endswith(tags.close)


def steer_thinking(prompt: str, think: Think, tags: Tags | None) -> str:
    """Make a rendered prompt's end open the thinking (`on`) or close it (`off`) where the template does not."""
    if tags is None or think == "auto":
        return prompt
    opens = prompt_opens_thinking(prompt, tags)
    if think == "off" and opens:
        return f"{prompt}\n{tags.close}\n\n" if not prompt.endswith("\n") else f"{prompt}{tags.close}\n\n"
    if think == "on" and not opens and not prompt_closes_thinking(prompt, tags):
        return f"{prompt}{tags.open}\n"
    return prompt


def split_finished(text: str) -> tuple[str | None, str, bool | None]:
    """Return (reasoning or None, content, closed) of a finished output, in the tags of whichever family wrote it.

    A template that opens the thinking itself leaves only the closing tag in the text.
    """
    harmony = _HARMONY.fullmatch(text) if "<|channel|>" in text else _BARE_HARMONY.fullmatch(text)
    if harmony and (harmony["thought"] or harmony["answer"]):
        thought, answer = harmony["thought"], harmony["answer"]
        return thought, (answer or "").strip(), None if thought is None else answer is not None
    start = text.lstrip()
    opened = next((tags for tags in _KNOWN if start.startswith(tags.open)), None)
    if opened:
        return split_thinking(text, starts_inside=False, tags=opened)
    closed = next(
        (tags for tags in _KNOWN if tags.close in text and tags.open not in text.partition(tags.close)[0]), None
    )
    return split_thinking(text, closed is not None, closed or THINK)


def split_thinking(text: str, starts_inside: bool, tags: Tags = THINK) -> tuple[str | None, str, bool | None]:
    """Return (reasoning or None, content, closed) of a finished output; closed is None if thinking never opened."""
    parser = ThinkingParser(starts_inside, tags)
    pieces = parser.feed(text) + parser.finish()
    thinking = "".join(piece for part, piece in pieces if part == "thinking")
    content = "".join(piece for part, piece in pieces if part == "answer")
    return (thinking if parser.opened else None), content, parser.closed


class ThinkingParser:
    """Split a stream of text into thinking and answer.

    Thinking opens at the very start of the output or not at all, and closes once: a tag that the answer quotes is text.
    A model that repeats the opening tag with which its prompt ended is forgiven.
    """

    def __init__(self, starts_inside: bool, tags: Tags = THINK) -> None:
        self.opened, self._tags = starts_inside, tags
        self._forbidden = False
        self._state: Literal["start", "opened", "thinking", "closed", "answer"] = "start"
        self._held = ""

    @property
    def closed(self) -> bool | None:
        """Whether the thinking has ended; None if it never opened."""
        return self._state in ("closed", "answer") if self.opened else None

    @property
    def decided(self) -> bool:
        """Whether there was enough text to tell if the output begins with thinking."""
        return self.opened or self._state != "start"

    @property
    def part(self) -> Part:
        """The part that the next text belongs to, as far as is known."""
        return "thinking" if self.closed is False else "answer"

    def forbid_tags(self) -> None:
        """Remove tags from the answer too: a model that was interrupted in its thinking may still want to close it."""
        self._forbidden = True

    def feed(self, text: str) -> list[tuple[Part, str]]:
        """Return the text that can be shown now, in order, as (part, text) with no empty text."""
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
        if self._state == "answer" and (answer := self._take_answer()):
            out.append(("answer", answer))
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
        text, close = self._held.lstrip(), self._tags.close
        was_closed = self._forbidden and not self.opened  # by the prompt; a model may close it once more
        while was_closed and text.startswith(close):
            text = text[len(close) :].lstrip()
        if was_closed:
            self._held = text
        if text.startswith(self._tags.open):
            self.opened, self._state, self._held = True, "opened", text[len(self._tags.open) :]
        elif not self._tags.open.startswith(text) and not (was_closed and close.startswith(text)):
            self._state = "opened" if self.opened else "answer"

    def _take_thought(self) -> str:
        """Take what is certainly thinking out of the held text, up to the closing tag if it is complete."""
        close = self._tags.close
        end = self._held.find(close)
        if end >= 0:
            thought, self._held = self._held[:end].removesuffix("\n"), self._held[end + len(close) :]
            self._state = "closed"
            return thought
        return self._take_but(n_held_back(self._held, close, f"\n{close}"))

    def _take_answer(self) -> str:
        """Take what is certainly answer out of the held text."""
        if not self._forbidden:
            return self._take_but(0)
        while any(tag in self._held for tag in self._tags):  # what remains may join into another tag
            for tag in self._tags:
                self._held = self._held.replace(tag, "")
        return self._take_but(n_held_back(self._held, *self._tags))

    def _take_but(self, n: int) -> str:
        """Take all but the last n characters of the held text."""
        cut = len(self._held) - n
        taken, self._held = self._held[:cut], self._held[cut:]
        return taken


def n_held_back(text: str, *endings: str) -> int:
    """Return how many last characters may yet turn out to begin one of the endings."""
    for length in range(min(max(map(len, endings), default=0), len(text)), 0, -1):
        if any(ending.startswith(text[-length:]) for ending in endings):
            return length
    return 0
