"""Read one chat completion off a server: the stream's events, the reasoning, the token ids and log-probabilities.

Servers put the reasoning in a field of its own, which has many names, in typed parts of the content or, between tags,
in its text. A stream is cut where it has become worthless: past `max_tokens` on a server that ignores it, or in a loop.
What was received until then is the completion; leaving the connection tells the server to stop. No reply takes more
than some 64 MiB of memory, whatever its length and its compression.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx
import numpy as np

from ....localrun.core.generation import Completion, FinishReason, TopLogprobs
from ....localrun.core.loops import LoopDetector
from ....localrun.families.thinking import split_finished

_ID_PREFIX = "token_id:"
_MAX_BYTES = 64 << 20  # of a reply, decompressed
_MAX_ERROR = 64 << 10  # bytes of a refusal
_MAX_LINE = 4 << 20  # bytes of a server-sent event
_MAX_COUNT = 1 << 40  # tokens; what reports more reports nonsense
_STOPS = frozenset({"stop", "end_turn", "stop_sequence", "eos_token", "eos", "complete", "completed"})
_LENGTHS = frozenset({"length", "max_tokens", "max_output_tokens", "model_length"})
_SLACK = 16  # tokens over the limit before a stream is cut: a server that keeps it is left to send its usage
# Words, numbers and runs of signs, about as tokenizers cut them, wherever the pieces of a stream begin and end.
_WORD = re.compile(r" ?[^\W\d_\u3040-\u9fff]{1,32}| ?\d{1,3}|(.)\1{0,15}", re.DOTALL)


class BrokenReply(Exception):
    """The reply broke off or makes no sense; the same request may get a whole one next time."""


class RefusedReply(Exception):
    """The server ended the answer for a reason that asking again will not change."""


class LoopWatch:
    """Finds a text that goes in circles while it arrives in pieces of any size."""

    def __init__(self) -> None:
        self._detector, self._rest = LoopDetector(), ""

    def add(self, piece: str) -> bool:
        """Return whether the text is in a loop with this piece."""
        text, start = self._rest + piece, 0
        while (word := _WORD.match(text, start)) and word.end() < len(text):  # the last may not be whole
            start = word.end()
            if self._detector.add(hash(word[0])):
                return True
        self._rest = text[start:]
        return False


@dataclass
class StreamedReply:
    """What was read so far. `n_pieces` counts text events, the token count of a server that reports no usage."""

    reasoning: list[str] = field(default_factory=list)
    content: list[str] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    """The server's entries, one a token."""
    finish_reason: str | None = None
    usage: dict[str, Any] = field(default_factory=dict)
    n_pieces: int = 0
    is_done: bool = False
    """Whether the server said that this was all."""
    is_summary: bool = False
    """Whether the reasoning is a summary of what the model thought."""
    _loops: LoopWatch = field(default_factory=LoopWatch)

    def add(self, choice: dict[str, Any], part: dict[str, Any]) -> None:
        """Take in a choice's delta or whole message."""
        reasoning, content = self._reasoning_in(part), part.get("content") or ""
        if isinstance(content, list):  # Mistral: thinking and text in typed parts
            reasoning += "".join(_texts(item.get("thinking")) for item in content if _is_a(item, "thinking"))
            content = "".join(_texts([item]) for item in content if _is_a(item, "text"))
        if not isinstance(content, str):
            raise BrokenReply("the server sent a message that is not text")
        if reasoning:
            self.reasoning.append(reasoning)
        if content:
            self.content.append(content)
        self.n_pieces += bool(reasoning or content)
        logprobs = choice.get("logprobs")
        entries = logprobs.get("content") if isinstance(logprobs, dict) else None
        self.logprobs += entries if isinstance(entries, list) else []
        if isinstance(reason := choice.get("finish_reason"), str) and reason:
            self.finish_reason = _finish(reason)

    def _reasoning_in(self, part: dict[str, Any]) -> str:
        """Return the reasoning in a delta or message, from the first field that has any."""
        for name in ("reasoning_content", "reasoning", "thinking"):
            if value := part.get(name):
                if not isinstance(value, str | list):
                    raise BrokenReply("the server sent reasoning that is not text")
                return _texts(value)
        details = part.get("reasoning_details")  # OpenRouter
        items = [item for item in details if isinstance(item, dict)] if isinstance(details, list) else []
        self.is_summary = self.is_summary or any(item.get("summary") for item in items)
        return "".join(_texts(item.get("text") or item.get("summary")) for item in items)

    @property
    def n_tokens(self) -> int:
        """Tokens received, as they are paid for: what the server reports, or else as many as can be counted.

        Some servers leave the reasoning out of `completion_tokens`: then the total has it, or it is more than they.
        """
        completion, reasoning = _count(self.usage, "completion_tokens"), self._n_reported
        total = _count(self.usage, "total_tokens") - _count(self.usage, "prompt_tokens")
        both = completion + reasoning if reasoning > completion else completion
        is_reported = completion or both
        return max(both, total) if is_reported else max(self.n_pieces, len(self.logprobs))

    def n_total(self, n_prompt: int) -> int:
        """Return the tokens of prompt and answer; `n_prompt` of the prompt where the server does not report it."""
        return self.n_tokens + (_count(self.usage, "prompt_tokens") or n_prompt)

    def runs_away(self, piece: str, max_tokens: int) -> Literal["length", "loop"] | None:
        """Return why the rest would be worthless, now that this piece has come; None if it may be good."""
        if self._loops.add(piece):
            return "loop"
        return "length" if self.n_tokens > max_tokens + _SLACK else None

    def completion(self, seconds: float, n_prompt: int) -> Completion:
        """Return the finished answer. `n_prompt` is the prompt's size in tokens where the server does not report it."""
        reasoning, content, closed = self._parts()
        n_completion = self.n_tokens
        # The token that ends a turn has no entry on some servers. Where more are missing, nobody knows which.
        is_whole = len(self.logprobs) >= n_completion - 1
        token_ids, logprobs = read_logprobs(self.logprobs) if is_whole else (None, None)
        return Completion(
            content=content,
            reasoning_content=reasoning,
            closed=closed,
            finish_reason=self._finish,
            prompt_tokens=_count(self.usage, "prompt_tokens") or n_prompt,
            completion_tokens=n_completion,
            reasoning_tokens=self._n_reasoning(reasoning, content),
            seconds=seconds,
            token_ids=token_ids,
            logprobs=logprobs,
        )

    @property
    def _finish(self) -> FinishReason:
        return "length" if self.finish_reason == "length" else "loop" if self.finish_reason == "loop" else "stop"

    def _parts(self) -> tuple[str | None, str, bool | None]:
        """Return (reasoning, content, whether thinking was closed)."""
        text, reasoning = "".join(self.content), "".join(self.reasoning) or None
        in_text, content, closed = split_finished(text)
        if reasoning is None:
            return in_text, content, closed
        # The server took the tags out, or has both: thinking was closed if anything came after it.
        content = content.lstrip("\n") if in_text is not None else text.lstrip("\n")
        return reasoning.strip("\n"), content, bool(content) or self._finish == "stop"

    def _n_reasoning(self, reasoning: str | None, content: str) -> int:
        """Return the reasoning tokens that the server reports, or else their share of the text's characters."""
        if not self._n_reported and reasoning:
            return round(self.n_tokens * len(reasoning) / max(1, len(reasoning) + len(content)))
        return self._n_reported

    @property
    def _n_reported(self) -> int:
        details = self.usage.get("completion_tokens_details")
        counts = details if isinstance(details, dict) else self.usage  # SGLang has it in the usage itself
        return _count(counts, "reasoning_tokens")


async def read_reply(
    response: httpx.Response, reply: StreamedReply, *, max_tokens: int, on_tokens: Callable[[int], None]
) -> None:
    """Read a streamed reply, or a whole one from a server that does not stream, to its end or until it runs away.

    `on_tokens` is called for each event with the number of its tokens. If this raises, `reply` holds what came.

    Raises:
        BrokenReply: it is cut short, not JSON, or an error event.
        RefusedReply: it ended with a content filter or a tool call.
    """
    if "event-stream" in response.headers.get("content-type", ""):
        async for event in _events(response, reply):
            n_before = reply.n_tokens
            piece = _take(reply, event, "delta")
            if piece or reply.usage:  # an event without either is no sign of life
                on_tokens(max(0, reply.n_tokens - n_before))
            if piece and reply.finish_reason is None:
                reply.finish_reason = reply.runs_away(piece, max_tokens)
                if reply.finish_reason:
                    return
    else:
        document = b"".join([chunk async for chunk in _bounded(response)])
        _take(reply, _parsed(document), "message")
        reply.is_done = bool(reply.content or reply.reasoning)
        on_tokens(reply.n_tokens)
    if reply.finish_reason is None and reply.is_done:
        reply.finish_reason = "length" if reply.n_tokens >= max_tokens else "stop"
    if reply.finish_reason is None:
        raise BrokenReply("the stream was cut before its end")
    if reply.finish_reason == "insufficient_system_resource":  # DeepSeek's word for an overloaded server
        raise BrokenReply("the server ran out of resources")
    if reply.finish_reason not in ("stop", "length"):
        raise RefusedReply(f"the server ended the answer with {reply.finish_reason!r}")


async def read_error(response: httpx.Response) -> bytes:
    """Return the first 64 KiB of a refusal."""
    read = b""
    async for chunk in response.aiter_bytes():
        read += chunk
        if len(read) >= _MAX_ERROR:
            break
    return read[:_MAX_ERROR]


async def _events(response: httpx.Response, reply: StreamedReply) -> AsyncIterator[Any]:
    """Yield the JSON of each server-sent event until `[DONE]`, which sets `reply.is_done`, or the end."""
    rest = b""
    async for chunk in _bounded(response):  # httpx's lines end at U+2028 too, which JSON may hold as it is
        *lines, rest = (rest + chunk).split(b"\n")
        if len(rest) > _MAX_LINE:
            raise BrokenReply(f"the server sent a line of more than {_MAX_LINE >> 20} MiB")
        for line in lines:
            data = line.removeprefix(b"data:").strip() if line.startswith(b"data:") else b""
            if data == b"[DONE]":
                reply.is_done = True
                return
            if data:
                yield _parsed(data)


async def _bounded(response: httpx.Response) -> AsyncIterator[bytes]:
    """Yield the bytes of a reply, decompressed.

    Raises:
        BrokenReply: there are more than any answer has.
    """
    n_bytes = 0
    async for chunk in response.aiter_bytes():
        n_bytes += len(chunk)
        if n_bytes > _MAX_BYTES:
            raise BrokenReply(f"the server sent more than {_MAX_BYTES >> 20} MiB")
        yield chunk


def _parsed(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise BrokenReply(f"the server sent no JSON: {data[:80].decode(errors='replace')!r}") from None


def _take(reply: StreamedReply, event: Any, part: str) -> str:
    """Add an event to the reply and return the text that it brought."""
    if not isinstance(event, dict):
        raise BrokenReply("the server sent JSON that is not an object")
    if event.get("error"):
        error = event["error"]
        message = error.get("message", error) if isinstance(error, dict) else error
        raise BrokenReply(f"the server broke off: {' '.join(str(message).split())[:200]}")
    if isinstance(event.get("usage"), dict):
        reply.usage = event["usage"]
    choices = event.get("choices")
    if not choices:
        return ""
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise BrokenReply("the server sent a choice that is not an object")
    choice = next((choice for choice in choices if not choice.get("index")), None)
    if choice is None:  # another answer, which nobody asked for
        return ""
    message = choice.get(part) or {}
    if not isinstance(message, dict):
        raise BrokenReply("the server sent a message that is not an object")
    n_reasoning, n_content = len(reply.reasoning), len(reply.content)
    reply.add(choice, message)
    return "".join(reply.reasoning[n_reasoning:] + reply.content[n_content:])


def _count(usage: dict[str, Any], name: str) -> int:
    value = usage.get(name)
    return value if type(value) is int and 0 < value < _MAX_COUNT else 0  # true is an int to Python, and no count


def _texts(value: Any) -> str:
    """Return the text of a field that holds a text, or a list of texts or of typed parts with one."""
    if isinstance(value, str):
        return value
    items = value if isinstance(value, list) else []
    texts = [item.get("text") if isinstance(item, dict) else item for item in items]
    return "".join(text for text in texts if isinstance(text, str))


def _is_a(item: Any, kind: str) -> bool:
    return isinstance(item, dict) and item.get("type") == kind


def _finish(reason: str) -> str:
    """Return a server's reason to end an answer: `stop` and `length` under these names, any other as it is."""
    name = reason.casefold()
    return "stop" if name in _STOPS else "length" if name in _LENGTHS else reason


def read_logprobs(entries: Sequence[Any]) -> tuple[tuple[int, ...] | None, TopLogprobs | None]:
    """Return the token ids `[T]` and log-probabilities `[T, k]` in a server's entries, one a token; None without any.

    OpenAI's format has the tokens as text alone. llama-server adds an `id`; vLLM, asked for
    `return_tokens_as_token_ids`, writes `token_id:123` instead of the text. Text does not say which token it was: two
    tokens may read alike, and half a character reads as nothing. So without ids nothing is kept. mlx-lm gives ids too,
    but at each place only those of the most probable tokens, not of the one that it chose: its entries, which have no
    `bytes`, do not count.

    Where a position has fewer than the others, the missing ones have the id -1 and the log-probability -inf.
    """
    try:
        token_ids = tuple(_id(entry) for entry in entries)
        rows = [_row(entry) for entry in entries]
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        return None, None
    k = max(map(len, rows), default=0)
    if not token_ids:
        return None, None
    if not k:
        return token_ids, None
    rows = [row + [(-math.inf, -1)] * (k - len(row)) for row in rows]
    values, ids = np.array(rows, np.float64).transpose(2, 0, 1)  # [T, k] each
    if max(ids.max(), max(token_ids)) >= 1 << 31 or min(token_ids) < 0:
        return None, None
    return token_ids, TopLogprobs(ids.astype(np.int32), values.astype(np.float32))


def _id(entry: Any) -> int:
    """Return the token id of an entry.

    Raises:
        KeyError, ValueError: it has none.
    """
    if "id" in entry and "bytes" in entry:
        return int(entry["id"])
    token = entry["token"]
    if not token.startswith(_ID_PREFIX):
        raise ValueError("no token id")
    return int(token.removeprefix(_ID_PREFIX))


def _row(entry: Any) -> list[tuple[float, int]]:
    """Return (log-probability, id) of a position's alternatives, the most probable first."""
    return sorted(((float(top["logprob"]), _id(top)) for top in entry.get("top_logprobs") or []), reverse=True)
