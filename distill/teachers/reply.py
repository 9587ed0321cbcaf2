"""Read one chat completion off a server: the stream's events, and the three places where servers put the reasoning."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx

from ...localrun.generation import Completion, FinishReason
from ...localrun.thinking import CLOSE, OPEN, split_thinking


class BrokenReply(Exception):
    """The reply broke off or makes no sense; the same request may get a whole one."""


class RefusedReply(Exception):
    """The server ended the answer for a reason that asking again will not change."""


@dataclass
class Reply:
    """What has been read so far. `n_pieces` counts text events, the token count of a server that reports no usage."""

    reasoning: list[str] = field(default_factory=list)
    content: list[str] = field(default_factory=list)
    finish_reason: str | None = None
    usage: dict[str, Any] = field(default_factory=dict)
    n_pieces: int = 0

    def add(self, choice: dict[str, Any], part: dict[str, Any]) -> None:
        """Take in a choice's delta or whole message."""
        reasoning = part.get("reasoning_content") or part.get("reasoning") or ""
        content = part.get("content") or ""
        if not isinstance(reasoning, str) or not isinstance(content, str):
            raise BrokenReply("a message that is no text")
        if reasoning:
            self.reasoning.append(reasoning)
        if content:
            self.content.append(content)
        self.n_pieces += bool(reasoning or content)
        self.finish_reason = choice.get("finish_reason") or self.finish_reason

    def completion(self, seconds: float) -> Completion:
        """Return the finished answer.

        Where the server counts no reasoning tokens, they are its share of the text's characters.
        """
        text, reasoning, closed = "".join(self.content), "".join(self.reasoning) or None, None
        finish: FinishReason = "length" if self.finish_reason == "length" else "stop"
        if reasoning is not None:
            # The server took the tags out: thinking was closed if anything came after it.
            reasoning, content = reasoning.strip("\n"), text.lstrip("\n")
            closed = bool(content) or finish == "stop"
        else:
            # A template that opens the thinking itself leaves only the closing tag in the text.
            starts_inside = CLOSE in text and OPEN not in text.partition(CLOSE)[0]
            reasoning, content, closed = split_thinking(text, starts_inside)
        n_completion = _count(self.usage, "completion_tokens") or self.n_pieces
        details = self.usage.get("completion_tokens_details")
        n_reasoning = _count(details, "reasoning_tokens") if isinstance(details, dict) else 0
        if not n_reasoning and reasoning:
            n_reasoning = round(n_completion * len(reasoning) / max(1, len(reasoning) + len(content)))
        return Completion(
            content=content,
            reasoning_content=reasoning,
            closed=closed,
            finish_reason=finish,
            prompt_tokens=_count(self.usage, "prompt_tokens"),
            completion_tokens=n_completion,
            reasoning_tokens=n_reasoning,
            seconds=seconds,
        )


def read_reply(response: httpx.Response, abandon: threading.Event) -> Reply:
    """Read a streamed reply, or a whole one from a server that does not stream, to its end.

    Raises:
        BrokenReply: it is cut short, no JSON, an error event, or nobody wants it any more.
        RefusedReply: it ended with a content filter or a tool call.
    """
    reply = Reply()
    if "event-stream" in response.headers.get("content-type", ""):
        for event in _events(response):
            if abandon.is_set():
                raise BrokenReply("abandoned")
            _take(reply, event, "delta")
    else:
        response.read()
        _take(reply, _parsed(response.text), "message")
    if reply.finish_reason is None:
        raise BrokenReply("the stream was cut before its end")
    if reply.finish_reason == "insufficient_system_resource":  # DeepSeek's word for an overloaded server
        raise BrokenReply("the server ran out of resources")
    if reply.finish_reason not in ("stop", "length"):
        raise RefusedReply(f"the server ended the answer with {reply.finish_reason!r}")
    return reply


def _events(response: httpx.Response) -> Iterator[Any]:
    """Yield the JSON of each server-sent event until `[DONE]` or the end."""
    for line in response.iter_lines():
        if not line.startswith("data:"):
            continue
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            return
        if data:
            yield _parsed(data)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise BrokenReply(f"the server sent no JSON: {text[:80]!r}") from None


def _take(reply: Reply, event: Any, part: str) -> None:
    if not isinstance(event, dict):
        raise BrokenReply("the server sent JSON that is no object")
    if event.get("error"):
        error = event["error"]
        message = error.get("message", error) if isinstance(error, dict) else error
        raise BrokenReply(f"the server broke off: {' '.join(str(message).split())[:200]}")
    if isinstance(event.get("usage"), dict):
        reply.usage = event["usage"]
    choices = event.get("choices")
    if not choices:
        return
    if not isinstance(choices, list) or not isinstance(choices[0], dict):
        raise BrokenReply("the server sent a choice that is no object")
    reply.add(choices[0], choices[0].get(part) or {})


def _count(usage: dict[str, Any], name: str) -> int:
    value = usage.get(name)
    return value if isinstance(value, int) and value > 0 else 0
