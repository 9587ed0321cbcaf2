"""Talk to a GGUF: a conversation in the terminal, or one question with `-p` and in pipes.

A conversation keeps each answer's thinking as `reasoning_content`; the model's template decides what of it the next
turn sees. What no longer fits the context is announced, and nothing is dropped from the conversation in silence.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import sys
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from prompt_toolkit import PromptSession
from rich.console import Console

from ..errors import ArtifactError, DeepDistillError, UsageError
from .engine import Engine, Step
from .find import find_model
from .generation import Message, Sampling
from .terminal import AnswerView, closing_note, console_on, line_reader, rate_note

__all__ = ["Conversation", "chat", "converse", "find_model"]

_HELP = """\
/help             these lines
/system TEXT      set the system message; without TEXT, show it; /system - removes it
/think on|off     let the model think before it answers
/reset            forget the conversation
/save FILE        write the conversation to a new JSON file
/quit             leave, as Ctrl-D does
Enter sends; Alt-Enter, or a backslash at the end of a line, begins a new line. Ctrl-C stops an answer.
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
    question = _question(prompt, piped or prompt is None) if once else ""
    with Engine(model_path, n_ctx=n_ctx) as engine:
        conversation = Conversation(engine, sampling, system, thinking)
        if once:
            _answer_once(conversation, question, json_output)
        else:
            converse(conversation, line_reader(), console_on())
    return 0


@dataclass
class Conversation:
    """What was said so far, and to whom."""

    engine: Engine
    sampling: Sampling
    system: str | None = None
    thinking: bool = True
    turns: list[Message] = field(default_factory=list)

    @property
    def messages(self) -> list[Message]:
        """The turns after the system message, if there is one."""
        return ([{"role": "system", "content": self.system}] if self.system else []) + self.turns

    def ask(self, question: str) -> Generator[Step]:
        """Yield the answer's steps; the turn is kept once anything was said, even if the iterator is closed early.

        Raises:
            ModelError: the conversation does not fit the context any more; it stays as it was.
        """
        asked: Message = {"role": "user", "content": question}
        prompt = self.engine.render([*self.messages, asked], thinking=self.thinking)
        steps: list[Step] = []
        try:
            for step in self.engine.stream(prompt, self.sampling):
                steps.append(step)
                yield step
        finally:
            if steps:
                self.turns += [asked, _answer(steps)]

    def save(self, path: Path, model: Path) -> None:
        """Write the conversation to a new JSON file.

        Raises:
            ArtifactError: the file is there already, or cannot be written.
        """
        if path.exists():
            raise ArtifactError(f"{path} exists and stays as it is", "give another name")
        content = {
            "model": str(model),
            "thinking": self.thinking,
            "sampling": dataclasses.asdict(self.sampling),
            "messages": self.messages,
        }
        beside = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            beside.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
            os.replace(beside, path)
        except OSError as error:
            raise ArtifactError(f"cannot write {path}: {error.strerror}") from error
        finally:
            if beside.exists():
                beside.unlink()


def _answer(steps: list[Step]) -> Message:
    text = {part: "".join(s.text for s in steps if s.part == part) for part in ("thinking", "answer")}
    message: Message = {"role": "assistant", "content": text["answer"]}
    if steps[-1].closed is not None:
        message["reasoning_content"] = text["thinking"]
    return message


def _is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and stream.isatty()


def _question(prompt: str | None, read_stdin: bool) -> str:
    """Return the prompt, then what standard input holds."""
    piped = ""
    if read_stdin and sys.stdin is not None:
        # Bytes of another encoding must not stop the question.
        buffer = getattr(sys.stdin, "buffer", None)
        piped = buffer.read().decode("utf-8", "replace") if buffer else sys.stdin.read()
    question = "\n\n".join(text for text in (prompt or "", piped.strip("\n")) if text.strip())
    if not question:
        raise UsageError("there is nothing to ask", "give -p 'QUESTION', or pipe one in")
    return question


def _answer_once(conversation: Conversation, question: str, json_output: bool) -> None:
    """Answer to standard output: drawn on a terminal, plain elsewhere, and as one JSON line if asked."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a character that a pipe's encoding lacks must not stop the answer
    draws = _is_terminal(sys.stdout) and not json_output
    view = AnswerView(console_on()) if draws else None
    aside = AnswerView(console_on(stderr=True)) if not draws and _is_terminal(sys.stderr) else None
    last: Step | None = None
    for last in conversation.ask(question):
        if view:
            view.show(last.part, last.text)
        elif last.part == "thinking":
            if aside:
                aside.show(last.part, last.text)
        elif not json_output:
            sys.stdout.write(last.text)
            sys.stdout.flush()
    for shown in (view, aside):
        if shown:
            shown.end()
    assert last is not None
    if json_output:
        print(json.dumps(_record(conversation, last), ensure_ascii=False))
    elif not view:
        print()
    note = closing_note(last, conversation.sampling.max_tokens, conversation.engine.n_ctx)
    if note:
        print(f"note: {note}", file=sys.stderr)


def _record(conversation: Conversation, last: Step) -> dict[str, object]:
    answer = conversation.turns[-1]
    return {
        "model": str(conversation.engine.path),
        "content": answer["content"],
        "reasoning_content": answer.get("reasoning_content"),
        "closed": last.closed,
        "finish_reason": last.finish_reason,
        "prompt_tokens": last.n_prompt,
        "completion_tokens": last.n_generated,
        "reasoning_tokens": last.n_reasoning,
        "tokens_per_s": round(last.tokens_per_s, 2),
    }


def converse(conversation: Conversation, reader: PromptSession[str], console: Console) -> None:
    """Read, answer and obey slash commands until /quit or Ctrl-D."""
    engine = conversation.engine
    console.print(f"{engine.path.name}, {engine.n_ctx} tokens of context. /help lists the commands.")
    while True:
        try:
            text = reader.prompt("> ")
        except KeyboardInterrupt:
            continue  # what was half typed is gone, as in a shell
        except EOFError:
            return
        if not text.strip():
            continue
        try:
            if not text.startswith("/"):
                _answer_aloud(conversation, text.strip(), console)
            elif not _obey(conversation, text, console.print):
                return
        except DeepDistillError as error:
            console.print(f"{error.message}; {error.hint}" if error.hint else error.message)


def _answer_aloud(conversation: Conversation, question: str, console: Console) -> None:
    view, last = AnswerView(console), None
    try:
        with closing(conversation.ask(question)) as steps:
            for last in steps:
                view.show(last.part, last.text)
    except KeyboardInterrupt:
        view.end()
        console.print("(stopped)", style="dim")
        return
    view.end()
    assert last is not None
    console.print(f"({rate_note(last)})", style="dim")
    note = closing_note(last, conversation.sampling.max_tokens, conversation.engine.n_ctx)
    if note:
        console.print(f"note: {note}")


def _obey(conversation: Conversation, line: str, say: Callable[[str], None]) -> bool:
    """Carry out one slash command; return False to leave."""
    command, _, rest = line.strip().partition(" ")
    rest = rest.strip()
    if command in ("/quit", "/exit"):
        return False
    if command == "/help":
        say(_HELP)
    elif command == "/reset":
        conversation.turns.clear()
        say("the conversation is empty; the system message stays")
    elif command == "/think" and rest in ("on", "off"):
        conversation.thinking = rest == "on"
        say(f"thinking is {rest}")
    elif command == "/think":
        say(f"thinking is {'on' if conversation.thinking else 'off'}; /think on or /think off changes it")
    elif command == "/system":
        if rest:
            conversation.system = None if rest == "-" else rest
        say(f"system: {conversation.system or '(none)'}")
    elif command == "/save" and rest:
        conversation.save(Path(rest).expanduser(), conversation.engine.path)
        say(f"saved {len(conversation.messages)} messages to {rest}")
    elif command == "/save":
        say("/save needs a file name")
    else:
        say(f"unknown command {command}; /help lists them")
    return True
