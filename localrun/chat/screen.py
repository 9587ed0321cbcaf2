"""Shows an answer as it streams: its thinking dim, or folded into one line, and its Markdown drawn."""

from __future__ import annotations

import time
from dataclasses import dataclass

from rich.console import Console
from rich.text import Text

from ..core.printable import printable
from ..engine.stream import Step
from ..families.thinking import Part
from .markdown import Markdown
from .wrap import Flow, is_drawable

_BAR = "│ "  # before every row of thinking, for terminals without colour


@dataclass(frozen=True)
class Thought:
    """A turn's thinking: its text, its tokens, and its seconds, which a resumed conversation does not have."""

    text: str
    n_tokens: int
    seconds: float | None = None

    def __str__(self) -> str:
        took = "" if self.seconds is None else f" for {self.seconds:.1f} s"
        return f"thought{took}, {self.n_tokens:,} tokens"


class Screen:
    """Shows one answer while it streams."""

    def __init__(self, console: Console, *, folded: bool = False, show_answer: bool = True) -> None:
        """Write to a console; without show_answer only the thinking, for an answer printed elsewhere."""
        self.folded, self._show_answer = folded, show_answer
        self._flow = Flow(console)
        self._markdown = Markdown(self._flow) if is_drawable(console) else None
        self._part: Part | None = None
        self._thought: list[str] = []
        self._n_thought, self._began, self._seconds = 0, 0.0, 0.0

    @property
    def thought(self) -> Thought | None:
        """The thinking so far; None if there is none."""
        text = "".join(self._thought).strip("\n")
        return Thought(text, self._n_thought, self._seconds) if text.strip() else None

    def wait(self) -> None:
        """Show that the model reads the prompt, until the first token."""
        self._flow.status("reading …")

    def show(self, step: Step) -> None:
        """Show a step's text."""
        self._n_thought = step.n_reasoning
        if step.part == "thinking":
            self._think(printable(step.text))
        else:
            self._close_thinking()
            if self._show_answer:
                self._answer(printable(step.text))

    def toggle(self) -> None:
        """Fold the current thinking, or unfold it."""
        self.folded = not self.folded
        if self._part == "thinking" and self._thought:
            if self.folded:
                self._flow.end()
            else:
                self._open_thought("".join(self._thought))

    def end(self) -> None:
        """Finish the last line, wherever the answer ended."""
        self._close_thinking()
        if self._markdown:
            self._markdown.end()
        self._flow.end()
        self._part = None

    def show_again(self, thought: Thought) -> None:
        """Show thinking that was folded."""
        self._open_thought(thought.text)
        self._flow.end()
        self._flow.line(Text(f"╰ {thought}", "dim"))

    def show_text(self, text: str) -> None:
        """Show a complete answer."""
        self._answer(printable(text))
        self.end()

    def _think(self, text: str) -> None:
        now = time.monotonic()
        if self._part is None:
            self._part, self._began = "thinking", now
        self._seconds = now - self._began
        if text := text if self._thought else text.lstrip("\n"):
            if self.folded:
                pass
            elif self._thought:
                self._flow.write(text, "dim")
            else:
                self._open_thought(text)
            self._thought.append(text)
        if self.folded:
            self._flow.status(f"▸ thinking … {self._seconds:.1f} s, {self._n_thought:,} tokens")

    def _open_thought(self, text: str) -> None:
        self._flow.begin(_BAR, _BAR)
        self._flow.write(text, "dim")

    def _close_thinking(self) -> None:
        if self._part != "thinking":
            return
        self._part, self._seconds = None, time.monotonic() - self._began
        self._flow.end()
        if thought := self.thought:
            self._flow.line(Text(f"{'▸' if self.folded else '╰'} {thought}", "dim"))
            self._flow.end()
            if not self.folded:
                self._flow.newline()

    def _answer(self, text: str) -> None:
        if self._part is None:
            text = text.lstrip("\n")
            self._part = "answer" if text else None
        if self._markdown is None:
            self._flow.write(text)
            return
        self._markdown.feed(text)
        if n := self._markdown.n_rows:
            self._flow.status(f"a table, {n} rows …")
