"""Where thinking and answer stream: the thinking dim and apart, or folded into one line; the answer's Markdown drawn.

Words are written once, at their final place, and wrapped at the width that the window has at that moment. Only the line
under way is ever written again, and only while it is a status line: lines that scrolled away, a resized window, a slow
ssh connection and a screen reader all get the same text.
"""

from __future__ import annotations

import re
import shutil
import time
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console
from rich.control import Control
from rich.segment import ControlType
from rich.text import Text

from .engine import Step
from .markdown import Markdown
from .thinking import Part

_WIDE = re.compile(r"([\u1100-\u115f\u2e80-\ua4cf\uac00-\ud7a3\uf900-\ufaff\ufe30-\ufe4f\uff00-\uff60\uffe0-\uffe6])")
_BAR = "│ "  # before every row of thinking, for those who see no colour
_STATUS_PER_S = 10  # a status line is drawn again at most that often: ssh may be slow

# A model's output is foreign text: without control characters it cannot steer the terminal, without bidirectional
# overrides it cannot show other text than it holds.
_CONTROL = {code: None for code in [*range(32), *range(127, 160)] if chr(code) not in "\n\t"}
_CONTROL |= dict.fromkeys([*range(0x202A, 0x202F), *range(0x2066, 0x206A)])


def printable(text: str) -> str:
    """Return foreign text without what could steer a terminal; newlines stay, tabs become spaces."""
    return text.translate(_CONTROL).expandtabs(4)


def new_console(*, stderr: bool = False) -> Console:
    """Return the console of this terminal. A dumb one's width rich does not ask for."""
    console = Console(stderr=stderr)
    return Console(stderr=stderr, width=shutil.get_terminal_size().columns) if console.is_dumb_terminal else console


def is_drawable(console: Console) -> bool:
    """Say whether a console is a terminal that knows styles and can write a line again."""
    return console.is_terminal and not console.is_dumb_terminal


class Flow:
    """Writes text a word at a time behind a margin, each word once; a word longer than a line is cut."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._margin = ""  # before every row of the line under way
        self._out = Text()  # for the next write to the console
        self._word, self._space = Text(), ""
        self._is_cut = False  # the word under way is longer than a row
        self._column = 0  # in cells, without the margin
        self._is_fresh = True  # this row's margin is still to be written
        self._has_status, self._status_at = False, 0.0

    def begin(self, first: str, rest: str) -> None:
        """Begin a line behind a margin; what it wraps into stands behind another of the same width."""
        self._out.append(first, "dim")
        self._margin, self._column, self._is_fresh = rest, 0, False

    def write(self, text: str, style: str = "") -> None:
        """Write text. The word under way is shown once it ends: by a space, `newline` or `end`."""
        for piece in re.split(r"(\s)", text):
            if piece == "\n":
                self.newline()
            elif piece.isspace():
                self._put_word()
                self._space, self._is_cut = self._space + piece, False
            else:
                for part in filter(None, _WIDE.split(piece)):
                    is_wide = _WIDE.fullmatch(part)  # beside such a character a line may always be broken
                    if is_wide:
                        self._put_word()
                        self._is_cut = False
                    self._word.append(part, style)
                    if is_wide:
                        self._put_word()
                    elif self._is_cut or self._word.cell_len > self._width:
                        self._is_cut = True
                        self._put_word()
        self._show()

    def newline(self) -> None:
        """End the line; the next one stands behind the same margin, unless it begins with another."""
        self._put_word()
        self._begin_row()
        self._out.append("\n")
        self._space, self._is_cut, self._column, self._is_fresh = "", False, 0, True
        self._show()

    def line(self, text: Text) -> None:
        """Write a line without a margin that the terminal itself wraps, so that it is copied as it was."""
        self._out.append_text(text)
        self._is_fresh = False
        self.newline()

    def table(self, rows: list[list[Text]]) -> None:
        """Write a table, its first row the heading, as wide as the window lets it be."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        drawn = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
        for heading in rows[0]:
            drawn.add_column(heading, overflow="fold")
        for row in rows[1:]:
            drawn.add_row(*row[: len(rows[0])])
        self._show()
        self._clear_status()
        self.console.print(drawn)
        self._is_fresh = True

    def end(self) -> None:
        """End the line under way, if there is one, its margin, and the status."""
        self._put_word()
        if self._column or not self._is_fresh:
            self.newline()
        self._clear_status()
        self._margin, self._space = "", ""

    @property
    def _width(self) -> int:
        return max(8, self.console.width - 1 - cell_len(self._margin))

    def _put_word(self) -> None:
        while self._word:
            room = self._width - self._column - len(self._space)
            if self._column and (room < 1 if self._is_cut else room < self._word.cell_len):
                self._out.append("\n")
                self._space, self._column, self._is_fresh = "", 0, True
                continue
            self._begin_row()
            n = _n_fitting(self._word.plain, max(room, 1))
            fitting, self._word = self._word[:n], self._word[n:]
            self._out.append(self._space).append_text(fitting)
            self._column += len(self._space) + fitting.cell_len
            self._space = ""

    def _begin_row(self) -> None:
        if self._is_fresh:
            self._out.append(self._margin, "dim")
            self._is_fresh = False

    def status(self, text: str) -> None:
        """Write a passing line at the start of a row: the next text, or status, takes its place."""
        now = time.monotonic()
        if not is_drawable(self.console) or (self._has_status and now - self._status_at < 1 / _STATUS_PER_S):
            return
        self._clear_status()
        line = Text(text, "dim")
        line.truncate(max(8, self.console.width - 1), overflow="crop")
        self.console.print(line, end="", soft_wrap=True, highlight=False)
        self._has_status, self._status_at = True, now

    def _clear_status(self) -> None:
        if self._has_status:
            self.console.control(Control(ControlType.CARRIAGE_RETURN, (ControlType.ERASE_IN_LINE, 2)))
            self._has_status = False

    def _show(self) -> None:
        if self._out:
            self._clear_status()
            self.console.print(self._out, end="", soft_wrap=True, highlight=False)
            self._out = Text()


def _n_fitting(text: str, width: int) -> int:
    """Return how many characters of a word fit a row, at least one."""
    if cell_len(text) <= width:
        return len(text)
    return next((n for n in range(len(text) - 1, 1, -1) if cell_len(text[:n]) <= width), 1)


@dataclass(frozen=True)
class Thought:
    """A turn's thinking: its text, tokens, and seconds, which nobody knows of another day's."""

    text: str
    n_tokens: int
    seconds: float | None = None

    def __str__(self) -> str:
        took = "" if self.seconds is None else f" for {self.seconds:.1f} s"
        return f"thought{took}, {self.n_tokens:,} tokens"


class Screen:
    """Shows one answer while it streams."""

    def __init__(self, console: Console, *, folded: bool = False, show_answer: bool = True) -> None:
        """Write to a console; without show_answer only the thinking, for an answer that goes elsewhere."""
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
        """Say that the prompt is being read, until the first token."""
        self._flow.status("reading …")

    def show(self, step: Step) -> None:
        """Show what a step let out."""
        self._n_thought = step.n_reasoning
        if step.part == "thinking":
            self._think(printable(step.text))
        else:
            self._close_thinking()
            if self._show_answer:
                self._answer(printable(step.text))

    def toggle(self) -> None:
        """Fold the thinking under way, or unfold it."""
        self.folded = not self.folded
        if self._part == "thinking" and self._thought:
            if self.folded:
                self._flow.end()
            else:
                self._open_thought("".join(self._thought))

    def end(self) -> None:
        """Finish the last line, wherever the answer was stopped."""
        self._close_thinking()
        if self._markdown:
            self._markdown.end()
        self._flow.end()
        self._part = None

    def show_again(self, thought: Thought) -> None:
        """Show thinking that was folded away."""
        self._open_thought(thought.text)
        self._flow.end()
        self._flow.line(Text(f"╰ {thought}", "dim"))

    def show_text(self, text: str) -> None:
        """Show an answer that is complete."""
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
