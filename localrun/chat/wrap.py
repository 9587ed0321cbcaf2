"""Stream text to a terminal word by word, wrapped at the current width of the window.

Each word is written once, in its final place. Only a status line is ever written again. So the text is right after
lines have scrolled away, in a resized window, over a slow connection and in a screen reader.
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
_STATUS_PER_S = 10  # how often a status line is redrawn, at most: ssh may be slow


def is_drawable(console: Console) -> bool:
    """Return whether a console is a terminal that can style text and rewrite a line."""
    return console.is_terminal and not console.is_dumb_terminal


class Flow:
    """Writes text word by word behind a margin, each word once; a word longer than a line is cut."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._margin = ""  # before every row of the current line
        self._out = Text()  # for the next write to the console
        self._word, self._space = Text(), ""
        self._is_cut = False  # the current word is longer than a row
        self._column = 0  # in cells, not counting the margin
        self._is_fresh = True  # this row's margin is still to be written
        self._has_status, self._status_at = False, 0.0

    def begin(self, first: str, rest: str) -> None:
        """Begin a line with the margin `first`; the rows that it wraps into get `rest`, of the same width."""
        self._out.append(first, "dim")
        self._margin, self._column, self._is_fresh = rest, 0, False

    def write(self, text: str, style: str = "") -> None:
        """Write text. The last word is shown once it is complete: after a space, `newline` or `end`."""
        for piece in re.split(r"(\s)", text):
            if piece == "\n":
                self.newline()
            elif piece.isspace():
                self._put_word()
                self._space, self._is_cut = self._space + piece, False
            else:
                for part in filter(None, _WIDE.split(piece)):
                    is_wide = _WIDE.fullmatch(part)  # a line may break before and after such a character
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
        """End the line; the next one has the same margin, unless `begin` sets another."""
        self._put_word()
        self._begin_row()
        self._out.append("\n")
        self._space, self._is_cut, self._column, self._is_fresh = "", False, 0, True
        self._show()

    def line(self, text: Text) -> None:
        """Write a line without a margin and let the terminal wrap it, so that a user can copy it unchanged."""
        self._out.append_text(text)
        self._is_fresh = False
        self.newline()

    def table(self, rows: list[list[Text]]) -> None:
        """Write a table, its first row the heading, as wide as the window allows."""
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
        """End the current line, its margin, and the status."""
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
        """Write a temporary line at the start of a row: the next text or status replaces it."""
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
