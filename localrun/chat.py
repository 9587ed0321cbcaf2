"""Talk to a GGUF: a conversation in the terminal, or one question with `-p`, in pipes and into files.

What no longer fits the context is announced, and nothing is dropped from a conversation in silence.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TextIO

from rich.console import Console

from ..errors import DeepDistillError, UsageError
from .engine import Engine, Step
from .find import find_model
from .generation import Sampling
from .session import Session
from .terminal import Screen, reader

__all__ = ["chat", "converse", "find_model"]

_HELP = """\
/help            these lines
/system TEXT     set the system message; without TEXT show it, with a dash for TEXT remove it
/think on|off    let the model think before it answers, or not
/reset           begin a new conversation
/save FILE       write the conversation to a new file: Markdown if it ends in .md, else JSON
/quit            leave, as Ctrl-D does
Enter sends; Alt-Enter, or a backslash before Enter, begins a new line. Ctrl-C stops an answer.
A message that begins with a slash is sent with a space before it."""


def chat(
    model_path: Path,
    *,
    system: str | None = None,
    thinking: bool = True,
    sampling: Sampling,
    n_ctx: int | None = None,
    prompt: str | None = None,
    json_output: bool = False,
) -> int:
    """Chat in the terminal, or answer once if there is a prompt, a pipe or no terminal to write to; return 0.

    Raises:
        ArtifactError, ModelError: the file cannot be run, or the question does not fit the context.
        UsageError: there is nothing to ask.
    """
    piped = not _is_terminal(sys.stdin)
    once = prompt is not None or piped or not _is_terminal(sys.stdout)
    if json_output and not once:
        raise UsageError("--json answers one question", "add -p 'QUESTION', or pipe one in")
    question = _question(prompt, read_stdin=piped or prompt is None) if once else ""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a character that the encoding lacks must not stop the answer
    with Engine(model_path, n_ctx=n_ctx) as engine:
        session = Session(engine, system=system, thinking=thinking, sampling=sampling)
        if once:
            _answer_once(session, question, json_output)
        else:
            converse(session, reader(), Console())
    return 0


def _is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and stream.isatty()


def _question(prompt: str | None, read_stdin: bool) -> str:
    """Return the prompt, then what standard input holds."""
    piped = ""
    if read_stdin and sys.stdin is not None:
        buffer = getattr(sys.stdin, "buffer", None)  # bytes: another encoding must not stop the question
        piped = buffer.read().decode("utf-8", "replace") if buffer else sys.stdin.read()
    question = "\n\n".join(text for text in (prompt or "", piped.strip("\n")) if text.strip())
    if not question:
        raise UsageError("there is nothing to ask", "give -p 'QUESTION', or pipe one in")
    return question


def _answer_once(session: Session, question: str, json_output: bool) -> None:
    """Answer on standard output: drawn on a terminal, plain elsewhere, one JSON line if asked.

    The thinking goes beside a plain answer, to standard error, if a terminal shows it.
    """
    on_screen = _is_terminal(sys.stdout) and not json_output
    screen = Screen(Console(stderr=not on_screen), show_answer=on_screen)
    draws = on_screen or _is_terminal(sys.stderr)
    last: Step | None = None
    text = {"thinking": "", "answer": ""}
    try:
        for last in session.ask(question):
            text[last.part] += last.text
            if draws:
                screen.write(last.part, last.text)
                screen.flush()
            if last.part == "answer" and not on_screen and not json_output:
                print(last.text, end="", flush=True)
    finally:
        screen.end()
    assert last is not None
    if json_output:
        print(json.dumps(_record(session, last, text["thinking"], text["answer"]), ensure_ascii=False))
    elif not on_screen and not text["answer"].endswith("\n"):
        print()
    if note := _note_if_cut(session, last):
        print(f"note: {note}", file=sys.stderr)


def _record(session: Session, last: Step, thinking: str, answer: str) -> dict[str, object]:
    return {
        "model": str(session.engine.path),
        "content": answer,
        "reasoning_content": None if last.closed is None else thinking,
        "closed": last.closed,
        "finish_reason": last.finish_reason,
        "prompt_tokens": last.n_prompt,
        "completion_tokens": last.n_generated,
        "reasoning_tokens": last.n_reasoning,
        "tokens_per_s": round(last.tokens_per_s, 2),
    }


def _note_if_cut(session: Session, last: Step) -> str | None:
    """Return why an answer is not whole; None if it is."""
    if last.finish_reason != "length":
        return None
    where = "thinking" if last.part == "thinking" else "answer"
    if last.n_generated >= session.sampling.max_tokens:
        return f"the {where} was cut at {last.n_generated} tokens; --max-tokens allows more"
    return f"the {where} was cut where the context of {session.engine.n_ctx} tokens is full; --context makes it larger"


def converse(session: Session, read: Callable[[], str], console: Console) -> None:
    """Read, answer and obey slash commands until /quit or Ctrl-D."""
    _say(console, f"{session.engine.path.name}, {session.engine.n_ctx} tokens of context. /help lists the commands.")
    going_on = True
    while going_on:
        try:
            going_on = _take_turn(session, read(), console)
        except KeyboardInterrupt:
            continue  # what was half typed is gone, as in a shell
        except EOFError:
            return


def _take_turn(session: Session, text: str, console: Console) -> bool:
    """Answer a message or obey a command; return False to leave."""
    try:
        if text.startswith("/"):
            return _obey(session, text, console)
        if text.strip():
            _answer(session, text.strip(), console)
    except DeepDistillError as error:
        _say(console, f"{error.message}; {error.hint}" if error.hint else error.message)
    return True


def _answer(session: Session, question: str, console: Console) -> None:
    """Answer one turn; Ctrl-C stops the answer."""
    screen = Screen(console)
    last: Step | None = None
    steps = session.ask(question)
    try:
        with closing(steps):
            for last in steps:
                screen.write(last.part, last.text)
                screen.flush()
    except KeyboardInterrupt:
        screen.end()
        kept = "" if session.turns and session.turns[-2]["content"] == question else "; the question is taken back"
        _say(console, f"(stopped{kept})")
        return
    screen.end()
    assert last is not None
    thinking = f", {last.n_reasoning} of them thinking" if last.n_reasoning else ""
    _say(console, f"({last.n_generated} tokens{thinking}, {last.tokens_per_s:.0f} tokens/s)")
    if note := _note_if_cut(session, last):
        _say(console, f"note: {note}")


def _say(console: Console, text: str) -> None:
    console.print(text, style="dim italic", markup=False, highlight=False, soft_wrap=True)


def _obey(session: Session, line: str, console: Console) -> bool:
    """Carry out one slash command; return False to leave."""
    command, _, rest = line.strip().partition(" ")
    rest = rest.strip()
    if command in ("/quit", "/exit"):
        return False
    if command == "/save" and rest:
        session.save(Path(rest))
    _say(console, _carry_out(session, command, rest))
    return True


def _carry_out(session: Session, command: str, rest: str) -> str:
    """Change the session as a command says; return what to tell the user."""
    if command == "/help":
        return _HELP
    if command == "/reset":
        session.reset()
        return "a new conversation; the system message stays"
    if command == "/think":
        if rest in ("on", "off"):
            session.thinking = rest == "on"
            if not session.knows_thinking_switch():
                return "this model's template has no switch for thinking"
        elif rest:
            return "/think on or /think off"
        return f"thinking is {'on' if session.thinking else 'off'}"
    if command == "/system":
        if rest:
            session.system = None if rest == "-" else rest
        return f"system message: {session.system or 'none'}"
    if command == "/save":
        return f"saved to {rest}" if rest else "/save needs a file name"
    return f"there is no {command}; /help lists the commands"
