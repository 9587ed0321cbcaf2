"""The chat's keyboard: a line editor with history and completion, and the keys pressed during an answer."""

from __future__ import annotations

import os
import re
import select
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from .conversations import data_dir

if TYPE_CHECKING:
    from prompt_toolkit.completion import Completer
    from prompt_toolkit.history import History
    from prompt_toolkit.key_binding import KeyBindings

_MENU = {
    "completion-menu.completion": "noinherit",
    "completion-menu.completion.current": "noinherit reverse",
    "completion-menu.meta.completion": "noinherit fg:ansibrightblack",
    "completion-menu.meta.completion.current": "noinherit reverse",
    "scrollbar.background": "noinherit",
    "scrollbar.button": "noinherit reverse",
}
FOLD_KEY = b"\x14"  # Ctrl-T
_SEQUENCE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|O.|.)?")  # what a key such as an arrow sends


Suggestions = Mapping[str, tuple[str, Callable[[], Iterable[str] | None]]]
"""Of each command its help, and a function that returns its arguments, or None if it takes a path."""


def reader(commands: Suggestions, *, on_fold: Callable[[], None], keeps_history: bool) -> Callable[[str], str]:
    """Return a function that reads one message, given the text that the line begins with.

    Enter sends; Alt-Enter or a trailing backslash begins a new line; Ctrl-T calls `on_fold`. The function raises
    EOFError on Ctrl-D and KeyboardInterrupt on Ctrl-C.
    """
    from prompt_toolkit import PromptSession
    from prompt_toolkit.application import get_app
    from prompt_toolkit.filters import Condition
    from prompt_toolkit.styles import Style

    session: PromptSession[str] = PromptSession(
        "› ",
        multiline=True,
        prompt_continuation="  ",
        key_bindings=_keys(on_fold),
        history=_history(keeps_history),
        completer=_completer(commands),
        complete_while_typing=Condition(lambda: get_app().current_buffer.text.startswith("/")),
        reserve_space_for_menu=4,
        style=Style.from_dict(_MENU),
        enable_open_in_editor=False,
    )

    def read(default: str = "") -> str:
        text = session.prompt(default=default)
        return text.encode("utf-8", "replace").decode()  # a terminal can send invalid UTF-8

    return read


def _keys(on_fold: Callable[[], None]) -> KeyBindings:
    from prompt_toolkit.application import run_in_terminal
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

    @keys.add("c-t")
    def _fold(event: KeyPressEvent) -> None:
        run_in_terminal(on_fold)

    return keys


def _completer(commands: Suggestions) -> Completer:
    from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
    from prompt_toolkit.document import Document

    class Slash(Completer):
        """Completes commands and their arguments."""

        def get_completions(self, document: Document, event: CompleteEvent) -> Iterator[Completion]:
            text = document.text_before_cursor
            if not text.startswith("/") or "\n" in text:
                return
            name, space, rest = text.partition(" ")
            if not space:
                for command, (help_, _) in commands.items():
                    if command.startswith(name):
                        yield Completion(command, start_position=-len(name), display_meta=help_)
                return
            arguments = commands[name][1]() if name in commands else ()
            if arguments is None:
                yield from PathCompleter(expanduser=True).get_completions(Document(rest), event)
            else:
                yield from (Completion(a, start_position=-len(rest)) for a in arguments if a.startswith(rest))

    return Slash()


class Keys:
    """Keys typed while an answer streams: read without echo, so that they do not appear in the middle of the text.

    Ctrl-C stays a signal. Without a POSIX terminal nothing is read.
    """

    def __init__(self) -> None:
        self._fd: int | None = None
        self._typed = b""

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Turn echo and line editing off while the block runs."""
        if os.name != "posix" or sys.stdin is None or not sys.stdin.isatty():
            yield
            return
        import termios

        self._fd = fd = sys.stdin.fileno()
        before = termios.tcgetattr(fd)
        quiet = termios.tcgetattr(fd)
        quiet[3] &= ~(termios.ECHO | termios.ICANON)
        try:
            termios.tcsetattr(fd, termios.TCSANOW, quiet)
            yield
        finally:
            self._read()
            self._fd = None
            termios.tcsetattr(fd, termios.TCSANOW, before)

    def folds(self) -> bool:
        """Return whether the folding key was pressed, and not pressed again, since the last call."""
        self._read()
        n = self._typed.count(FOLD_KEY)
        self._typed = self._typed.replace(FOLD_KEY, b"")
        return n % 2 == 1

    def typed(self) -> str:
        """Return the text that was typed, and forget it."""
        text, self._typed = _SEQUENCE.sub("", self._typed.decode("utf-8", "ignore")).replace("\r", "\n"), b""
        return "".join(character for character in text if character.isprintable() or character == "\n")

    def _read(self) -> None:
        while self._fd is not None and select.select([self._fd], [], [], 0)[0]:
            pressed = os.read(self._fd, 4096)
            if not pressed:
                return
            self._typed += pressed


def history_path() -> Path:
    """Return the path of the input history, in the user's data folder."""
    return data_dir() / "history"


def _history(is_kept: bool) -> History:
    """Return the history on disk, or one in memory if nothing is to be kept or the folder is read-only."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    path = history_path()
    if not is_kept:
        return InMemoryHistory()
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.touch(mode=0o600)
    except OSError:
        return InMemoryHistory()
    return FileHistory(path) if os.access(path, os.R_OK | os.W_OK) else InMemoryHistory()
