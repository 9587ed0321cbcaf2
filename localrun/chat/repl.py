"""The loop of a chat: read a line, answer it or run its command, and survive whatever goes wrong."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from ...errors import DeepDistillError
from .commands import COMMANDS, run_command
from .conversations import Conversation
from .dialogue import Dialogue
from .keyboard import reader
from .session import Question


def converse(dialogue: Dialogue, kept: tuple[Path, Conversation] | None = None, images: tuple[str, ...] = ()) -> None:
    """Answer messages and run slash commands until /quit or Ctrl-D; `kept` is the conversation to resume."""
    dialogue.greet()
    if kept:
        dialogue.take_up(*kept)
    dialogue.pending = Question("", images=images)
    suggestions = {name: (command.help, partial(command.choices, dialogue)) for name, command in COMMANDS.items()}
    read = reader(suggestions, on_fold=dialogue.fold, keeps_history=dialogue.store is not None)
    while True:
        try:
            draft = dialogue.pending.typed
            dialogue.pending = dialogue.pending._replace(typed="")
            _take_turn(dialogue, read(draft))
        except KeyboardInterrupt:
            continue  # what was half typed is gone, as in a shell
        except EOFError:
            break
    dialogue.leave()


def _take_turn(dialogue: Dialogue, text: str) -> None:
    """Answer a message or run a command.

    Raises:
        EOFError: the command was /quit.
    """
    try:
        if text.startswith("/"):
            run_command(dialogue, text)
        elif text.strip():
            dialogue.answer(dialogue.pending._replace(typed=text.strip()))
    except DeepDistillError as error:
        dialogue.say(f"{error.message}; {error.hint}" if error.hint else error.message)
