"""Answer one question, as a filter in a pipeline: only the answer goes to standard output."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, TextIO

from ...errors import UsageError
from ..engine.stream import Step
from .session import Question, Session

if TYPE_CHECKING:
    from ..families.tool_calls import ToolCall
    from .screen import Screen


def is_terminal(stream: TextIO | None) -> bool:
    """Say whether a standard stream is a terminal."""
    return stream is not None and stream.isatty()


def read_question(prompt: str | None, read_stdin: bool) -> str:
    """Return the prompt, followed by the text piped in.

    Raises:
        UsageError: code "no-question": both are empty.
    """
    piped = ""
    if read_stdin and sys.stdin is not None:
        buffer = getattr(sys.stdin, "buffer", None)  # bytes: another encoding must not stop the question
        piped = buffer.read().decode("utf-8", "replace") if buffer else sys.stdin.read()
    given = (prompt or "").encode("utf-8", "surrogateescape").decode("utf-8", "replace")  # an argument is bytes too
    question = "\n\n".join(text for text in (given, piped.strip("\n")) if text.strip())
    if not question:
        raise UsageError("there is nothing to ask", "give -p 'QUESTION', or pipe one in", code="no-question")
    return question


def answer_once(session: Session, question: Question, *, json_output: bool = False, folded: bool = False) -> None:
    """Answer on standard output: with Markdown drawn on a terminal, plain elsewhere, as one JSON line if asked.

    Where tools were offered, the answer is printed once it is complete, followed by a JSON line for each call. The
    thinking goes to standard error, if that is a terminal.

    Raises:
        ModelError: the question does not fit the context.
    """
    whole = json_output or bool(session.tools)  # a call can only be read whole
    on_screen = is_terminal(sys.stdout) and not whole
    screen = _screen(on_screen, folded) if on_screen or is_terminal(sys.stderr) else None
    last: Step | None = None
    text, notes = {"thinking": "", "answer": ""}, []
    try:
        for last in session.ask(question):
            text[last.part] += last.text
            notes += [last.note] if last.note else []
            if screen:
                screen.show(last)
            if last.part == "answer" and not (on_screen or whole):
                print(last.text, end="", flush=True)
    finally:
        if screen:
            screen.end()
    assert last is not None
    content, calls = _split_calls(session, text["answer"])
    if json_output:
        record = _answer_record(session, last, thinking=text["thinking"], answer=content) | {"notes": notes}
        print(json.dumps(record | ({"tool_calls": calls} if session.tools else {})))
    elif whole:
        print(*([content] if content.strip() else []), *map(json.dumps, calls), sep="\n")
    elif not on_screen and not content.endswith("\n"):
        print()
    for note in [*notes, *why_cut(session, last)]:
        print(f"note: {note}", file=sys.stderr)


def _split_calls(session: Session, answer: str) -> tuple[str, list[ToolCall]]:
    """Return an answer's text without its tool calls, and the calls."""
    if not session.tools:
        return answer, []
    from ..families.tool_calls import parse_tool_calls

    return parse_tool_calls(answer, {tool["function"]["name"] for tool in session.tools})


def _screen(on_screen: bool, folded: bool) -> Screen:
    from ..core.printable import new_console
    from .screen import Screen  # a pipe, where nothing is drawn, does without rich

    return Screen(new_console(stderr=not on_screen), folded=folded, show_answer=on_screen)


def _answer_record(session: Session, last: Step, *, thinking: str, answer: str) -> dict[str, object]:
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


def why_cut(session: Session, last: Step) -> list[str]:
    """Return why an answer was cut off; nothing if it is complete."""
    if last.finish_reason != "length":
        return []
    where = "thinking" if last.part == "thinking" else "answer"
    if last.n_generated >= session.sampling.max_tokens:
        return [f"the {where} was cut off after {last.n_generated} tokens; --max-tokens allows more"]
    return [f"the {where} was cut off: the context of {session.engine.n_ctx} tokens is full; --context makes it larger"]
