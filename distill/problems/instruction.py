"""The instruction that a problem is asked with: a system turn, which teacher, student and chat see alike.

The question stays as it is, so that an instruction moves no problem to another part of the split.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ...localrun.core.generation import Message


def usual_instruction(grader: str, metadata: Mapping[str, Any]) -> str:
    """Return how an answer has to end so that its grader reads it; empty where graders read any answer well."""
    if grader.partition(":")[0] == "json":
        return "Answer with one JSON object and nothing else."
    if grader == "label":
        names = list(metadata["choices"])
        if metadata.get("several"):
            return f"End with the labels alone on the last line, separated by commas. They are: {', '.join(names)}."
        return f"End with the label alone on the last line: {', '.join(names[:-1])} or {names[-1]}."
    return ""


def instructed(messages: Sequence[Message], text: str) -> list[Message]:
    """Return a conversation with an instruction in its system turn, behind what that says already."""
    if not text:
        return list(messages)
    first, rest = messages[0], list(messages[1:])
    if first["role"] == "system":
        return [{"role": "system", "content": f"{first['content']}\n\n{text}"}, *rest]
    return [{"role": "system", "content": text}, first, *rest]


def shared_system(conversations: Iterable[Sequence[Message]]) -> str:
    """Return the system turn that all conversations begin with; empty if they differ or have none."""
    first = [messages[0] for messages in conversations]
    found = {turn["content"] if turn["role"] == "system" else "" for turn in first}
    return found.pop() if len(found) == 1 else ""
