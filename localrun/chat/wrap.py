"""Text that streams to a terminal a word at a time, wrapped at the width that the window has at that moment.

Words are written once, at their final place. Only the line under way is ever written again, and only while it is a
status line: lines that scrolled away, a resized window, a slow connection and a screen reader all get the same text.
"""

from __future__ import annotations

import re
import time

from rich.cells import cell_len
from rich.console import Console
from rich.control import Control
from rich.segment import ControlType
from rich.text import Text

_WIDE = re.compile(r"([\u1100-\u115f\u2e80-\ua4cf\uac00-\ud7a3\uf900-\ufaff\ufe30-\ufe4f\uff00-\uff60\uffe0-\uffe6])")
_STATUS_PER_S = 10  # a status line is drawn again at most that often: ssh may be slow


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
