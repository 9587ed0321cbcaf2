"""The chat's terminal: where a user types, and where thinking and answer stream, the thinking dim and apart."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.console import Console

from .thinking import Part

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import History
    from prompt_toolkit.key_binding import KeyBindings

# A model's output is foreign text: without its control characters it cannot steer the terminal.
_CONTROL = {code: None for code in [*range(32), *range(127, 160)] if chr(code) not in "\n\t"}


class Screen:
    """Streams an answer: thinking dim behind a bar, a blank line, the answer; words are wrapped, not cut."""

    def __init__(self, console: Console, *, show_answer: bool = True) -> None:
        """Write to a console; without show_answer only the thinking, for an answer that goes elsewhere."""
        self.console, self._show_answer = console, show_answer
        self._part: Part | None = None
        self._word, self._column = "", 0

    def write(self, part: Part, text: str) -> None:
        """Show more text of a part."""
        if part == "answer" and not self._show_answer:
            return
        if part != self._part:
            text = text.lstrip("\n") if self._part is None or part == "answer" else text
            if not text:
                return
            self._turn_to(part)
        for piece in re.split(r"(\s)", text.translate(_CONTROL).expandtabs(4)):
            if piece.isspace():
                self._put_word()
                self._newline() if piece == "\n" else self._put(piece)
            else:
                self._word += piece
                if cell_len(self._word) >= self._width:
                    self._put_word()  # longer than a line, or in a script without spaces

    def flush(self) -> None:
        """Show the word under way, however it goes on; between steps, so that a slow model is followed."""
        self._put_word()

    def end(self) -> None:
        """Finish the answer's last line."""
        self._put_word()
        if self._column:
            self._raw("\n")
        self._part, self._column = None, 0

    def _turn_to(self, part: Part) -> None:
        self._put_word()
        if self._part is not None:
            self._raw("\n\n" if self._column else "\n")
        self._part, self._column = part, 0
        self._begin_line()

    @property
    def _bar(self) -> str:
        return "│ " if self._part == "thinking" else ""

    @property
    def _width(self) -> int:
        return max(20, self.console.width - 1) - len(self._bar)

    def _begin_line(self) -> None:
        self._raw(self._bar)

    def _newline(self) -> None:
        self._raw("\n")
        self._column = 0
        self._begin_line()

    def _put_word(self) -> None:
        if self._word:
            self._put(self._word)
            self._word = ""

    def _put(self, text: str) -> None:
        length = cell_len(text)
        if self._column and self._column + length > self._width:
            self._newline()
            if text.isspace():
                return
        self._raw(text)
        self._column += length

    def _raw(self, text: str) -> None:
        style = "dim" if self._part == "thinking" else None
        self.console.print(text, style=style, end="", markup=False, highlight=False, soft_wrap=True)


def reader() -> Callable[[], str]:
    """Return a function that reads one message: Enter sends, Alt-Enter or a trailing backslash begins a new line.

    It raises EOFError on Ctrl-D and KeyboardInterrupt on Ctrl-C.
    """
    from prompt_toolkit import PromptSession

    session: PromptSession[str] = PromptSession(
        "› ",
        multiline=True,
        prompt_continuation="  ",
        key_bindings=_keys(),
        history=_history(),
        enable_open_in_editor=False,
    )
    return lambda: session.prompt()


def _keys() -> KeyBindings:
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("enter")
    def _enter(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.current_line_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.newline(copy_margin=False)
        elif buffer.text.strip():
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _alt_enter(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    return keys


def history_path() -> Path:
    """Return the file that keeps what was typed, in the user's data folder."""
    base = os.environ.get("XDG_DATA_HOME")
    return (Path(base) if base else Path.home() / ".local" / "share") / "deepdistill" / "history"


def _history() -> History:
    """Return the history on disk; one in memory where the user's folder cannot be written."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    path = history_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.touch(mode=0o600)
    except OSError:
        return InMemoryHistory()
    return FileHistory(path) if os.access(path, os.R_OK | os.W_OK) else InMemoryHistory()
