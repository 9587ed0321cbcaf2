"""Ask an endpoint for one answer until it comes or there is no hope of it: limits, servers, retries, log-probabilities.

A request that can succeed later is tried again, with growing pauses or when the server says. One that never can fails
alone. An error that no request can survive is raised.
"""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

import httpx

from ....errors import TeacherError
from ....localrun.core.generation import Completion, Message, Sampling
from ...records import Request
from .body import RequestBody
from .concurrency import AdaptiveConcurrency, RateLimit
from .server import Refused, Retryable, Server, least_busy
from .stream import StreamedReply

# Where 40 % of all attempts fail, 16 of them fail in a row for one request in two million.
ATTEMPTS = 16
FIRST_ATTEMPTS = 3  # until the server has answered once: it may not exist
_FIRST_REFUSALS = 10  # likewise, if it exists: about two minutes, in which a model may get ready
_TELL_AFTER, _TELL_EVERY_S = 6, 60.0  # failures of one request in a row: chance alone seldom gives as many
_SAME_REFUSALS = 5  # in a row, until no other request is sent
_FILTERED = re.compile(
    r"content.?(?:filter|management|policy|safety)|safety|moderat|inappropriate|sensitive", re.IGNORECASE
)
_LONGEST_WAIT_S = 24 * 3600.0
_TOKENS_A_CHARACTER = 0.3  # of English, Source: https://api-docs.deepseek.com/quick_start/token_usage

# Ways to ask for log-probabilities, each for servers that refuse the one before: as many as wanted, with vLLM's switch
# for token ids; OpenAI's limit of 20; that without the switch; none.
_LOGPROBS_FORMS: tuple[tuple[int, bool], ...] = ((1 << 16, True), (20, True), (20, False), (0, False))


@dataclass
class Endpoint:
    """What the calls of one teacher share: servers and model, how much to ask at once, what was learned so far."""

    servers: Sequence[Server]
    body: RequestBody
    concurrency: AdaptiveConcurrency
    rpm: RateLimit
    tpm: RateLimit
    timeout_s: float
    max_backoff_s: float
    n_answers: int = 0
    n_tokens: int = 0  # in those answers, without their prompts

    @property
    def hosts(self) -> str:
        """The servers' hosts, in words."""
        return ", ".join(server.host for server in self.servers)


class Asker:
    """Answers the requests of one call, each by `answer`. Everything here runs on one event loop: it needs no lock."""

    def __init__(
        self, endpoint: Endpoint, sampling: Sampling, *, top_logprobs: int, on_note: Callable[[str], None]
    ) -> None:
        self.stopped = asyncio.Event()
        """No new attempts, and no more waiting; what is in flight may end."""
        self.changed = asyncio.Event()
        """Something happened that `until` may wait for."""
        self._endpoint, self._sampling, self._top_logprobs = endpoint, sampling, top_logprobs
        self._on_note = on_note
        self._gate = asyncio.Lock()
        self._n_given_up = 0  # in a row
        self._n_refused, self._refusal = 0, ""  # likewise, for the same reason
        self._told_at = -_TELL_EVERY_S
        self._noted: set[str] = set()

    async def until(self, is_ready: Callable[[], bool]) -> None:
        """Wait until something holds, or the run stops."""
        while not (is_ready() or self.stopped.is_set()):
            self.changed.clear()
            await self.changed.wait()

    async def _pause(self, seconds: float) -> None:
        """Wait for some time, or until the run stops."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self.stopped.wait(), seconds)

    async def answer(self, client: httpx.AsyncClient, request: Request) -> Completion | None:
        """Return the answer, or a failure that is final; None if the run stopped meanwhile.

        Raises:
            TeacherError: `code` "server-down", "server-keeps-failing" or "server-refuses": no request can succeed.
        """
        pending = _Pending(request, estimate_tokens(request.messages), time.monotonic())
        for attempt in count(1):
            try:
                reply = await self._attempt(client, pending)
                completion = pending.completion(reply, not_sent=frozenset(self._endpoint.body.left_out))
            except Retryable as error:
                if self.stopped.is_set():
                    return None
                if attempt >= self._most_attempts(error):
                    self._give_up(error)
                    return pending.failed(f"after {attempt} attempts: {error}")
                if not error.at_once:
                    self._tell(attempt, error)
                    await self._pause(self._wait_s(attempt, error))
            except Refused as error:
                self._count_refusal(error)
                return pending.failed(str(error))
            else:
                break
        self._n_given_up = self._n_refused = 0
        self._note_shape(reply, completion)
        self._endpoint.n_answers += 1
        self._endpoint.n_tokens += completion.completion_tokens
        return completion

    def _note_shape(self, reply: StreamedReply, completion: Completion) -> None:
        """Tell the user, once each, what makes answers of this server worth less."""
        notes = {
            "it gives a summary of its reasoning, not the reasoning": reply.is_summary,
            "an answer is all in the reasoning, and counts as unknown: check the server's reasoning parser "
            "(vLLM and SGLang: --reasoning-parser)": completion.finish_reason == "stop"
            and not completion.content.strip()
            and bool(completion.reasoning_content),
        }
        for note, holds in notes.items():
            if holds and note not in self._noted:
                self._noted.add(note)
                self._on_note(f"{self._endpoint.hosts}: {note}")

    def _give_up(self, error: Retryable) -> None:
        """Count a request that was given up.

        Raises:
            TeacherError: the server was never there, or too many were given up in a row.
        """
        endpoint = self._endpoint
        self._n_given_up += 1
        if error.down and not endpoint.n_answers:
            raise is_absent(endpoint.servers[0], str(error)) from None
        if self._n_given_up >= max(4, endpoint.concurrency.level):
            raise TeacherError(
                f"{endpoint.hosts} failed {self._n_given_up} requests in a row, the last with: {error}",
                "every earlier answer is kept; run the same command again when the server works",
                code="server-keeps-failing",
            ) from None

    def _count_refusal(self, error: Refused) -> None:
        """Count a request that the server refused for what is in it.

        Raises:
            TeacherError: it refuses one after the other for the same reason, so that it would refuse all.
        """
        reason = re.sub(r"\d+", "#", error.refusal)
        if not error.refusal or _FILTERED.search(reason):  # that is up to the question
            return
        self._n_refused = self._n_refused + 1 if reason == self._refusal else 1
        self._refusal = reason
        if self._n_refused >= _SAME_REFUSALS:
            raise TeacherError(
                f"{self._endpoint.hosts} refuses every request: {error}",
                "change what it names (--max-tokens, --body, …); every earlier answer is kept",
                code="server-refuses",
            ) from None

    def _most_attempts(self, error: Retryable) -> int:
        if self._endpoint.n_answers:
            return ATTEMPTS
        return FIRST_ATTEMPTS if error.down else _FIRST_REFUSALS

    def _tell(self, attempt: int, error: Retryable) -> None:
        """Tell the user, now and then, why nothing seems to happen."""
        enough = _TELL_AFTER if self._endpoint.n_answers else FIRST_ATTEMPTS
        wait_s = error.retry_after or 0.0
        if (attempt >= enough or wait_s > _TELL_EVERY_S) and time.monotonic() - self._told_at >= _TELL_EVERY_S:
            self._told_at = time.monotonic()
            again = (
                f" at {time.strftime('%H:%M on %d %b', time.localtime(time.time() + wait_s))}" if wait_s > 60 else ""
            )
            self._on_note(f"{self._endpoint.hosts}: {error}; asking again{again}")

    def _wait_s(self, attempt: int, error: Retryable) -> float:
        """Return how long to wait for the next attempt: less than a server asks for while another one works."""
        servers = self._endpoint.servers
        heed_server = len(servers) == 1 or not any(server.may_be_asked for server in servers)
        return backoff(attempt, error.retry_after if heed_server else None, longest_s=self._endpoint.max_backoff_s)

    async def _attempt(self, client: httpx.AsyncClient, pending: _Pending) -> StreamedReply:
        """Ask once the limits allow it, the server that is least busy then. Replies that break off go to `one`."""
        endpoint = self._endpoint
        expected = pending.n_prompt + self._expected_tokens()
        server = await self._next_server(expected)
        used = 0
        try:
            reply = await self._ask(client, server, pending.request)
            used = reply.n_total(pending.n_prompt)
            server.has_answered()
            endpoint.concurrency.answered()
            return reply
        except (Refused, Retryable) as error:
            if error.reply and error.reply.n_tokens:
                used = error.reply.n_total(pending.n_prompt)
                pending.broken.append(error.reply)
            if isinstance(error, Retryable):
                self._note_failure(server, error)
            raise
        finally:
            endpoint.tpm.correct(used - expected)
            server.n_in_flight -= 1
            self.changed.set()

    async def _next_server(self, n_tokens: float) -> Server:
        """Wait until the limits allow a request of so many tokens, and return the server to ask.

        Raises:
            Retryable: the run has stopped.
        """
        endpoint = self._endpoint
        async with self._gate:
            await self.until(lambda: sum(s.n_in_flight for s in endpoint.servers) < endpoint.concurrency.level)
            while (wait := max(endpoint.rpm.wait_s, endpoint.tpm.wait_s)) > 0 and not self.stopped.is_set():
                await self._pause(min(wait, 1.0))  # answers that end meanwhile may have shortened it
            if self.stopped.is_set():
                raise Retryable("the run has stopped")
            endpoint.rpm.take(1)
            endpoint.tpm.take(n_tokens)
            server = least_busy(endpoint.servers)
            server.n_in_flight += 1
        return server

    def _note_failure(self, server: Server, error: Retryable) -> None:
        was_down = server.is_down
        server.has_failed(error)
        if error.status:
            self._endpoint.concurrency.pushed_back()
        if server.is_down and not was_down and len(self._endpoint.servers) > 1:
            self._on_note(f"{server.host} is down ({error}): the others continue, and it is tried again now and then")

    def _expected_tokens(self) -> float:
        """Return how many tokens an answer may take: the average of earlier ones, at first the limit."""
        endpoint = self._endpoint
        return endpoint.n_tokens / endpoint.n_answers if endpoint.n_answers else self._sampling.max_tokens

    async def _ask(self, client: httpx.AsyncClient, server: Server, request: Request) -> StreamedReply:
        """Ask with as many log-probabilities as are wanted, then with as many as the server accepts."""
        k = self._top_logprobs
        refused: Refused | Retryable | None = None
        for attempt, (form, body) in enumerate(self._bodies(server, request)):
            if attempt:
                self._endpoint.rpm.take(1)
            try:
                reply = await server.ask(
                    client, body, timeout_s=self._endpoint.timeout_s, concurrency=self._endpoint.concurrency
                )
            except Refused as error:
                refused = refused or error
                if (learned := self._endpoint.body.learn(error.refusal, body)) is not None:
                    if learned:
                        self._on_note(f"{server.host} {learned}")
                    raise Retryable(str(error), at_once=True) from None
                continue
            except Retryable as error:
                # mlx-lm hangs up on numbers that it does not accept.
                if not (k and error.hung_up) or server.logprobs_taken:
                    raise
                refused = refused or error
                continue
            server.logprobs_taken = server.logprobs_taken or k > 0
            if form > server.logprobs_form:
                server.logprobs_form = form
                self._on_note(_logprobs_note(server, k))
            return reply
        assert refused is not None
        raise refused

    def _bodies(self, server: Server, request: Request) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield (form, body) for each way to ask for log-probabilities from the one that the server accepted on."""
        k, first, last = self._top_logprobs, server.logprobs_form, None
        for form, (most, with_ids) in enumerate(_LOGPROBS_FORMS[first:], first) if k else [(first, (0, False))]:
            body = self._endpoint.body.build(request, self._sampling, n_logprobs=min(k, most), with_ids=with_ids)
            if body != last:
                yield form, body
            last = body


def backoff(attempt: int, asked_s: float | None, *, longest_s: float) -> float:
    """Return how many seconds to wait: those that the server asked for, else twice as long after each attempt."""
    if asked_s is not None:
        return min(asked_s, _LONGEST_WAIT_S)
    # Jitter, so that requests that failed together do not come back together.
    return min(longest_s, 0.5 * 2.0 ** (attempt - 1)) * random.uniform(0.5, 1.0)


def is_absent(server: Server, reason: str) -> TeacherError:
    """Return the error for a server that never answered."""
    hint = "is the server running, and is this its address?"
    if "CERTIFICATE" in reason:
        hint = "if the certificate is yours, set SSL_CERT_FILE to the file of the authority that signed it"
    elif "proxy" in reason:
        hint = "check HTTPS_PROXY and ALL_PROXY, or name the server in NO_PROXY"
    return TeacherError(f"no answer from {server.url}: {reason}", hint, code="server-down")


def estimate_tokens(messages: Sequence[Message]) -> int:
    """Return about how many tokens a conversation takes, where the server does not report it."""
    return round(_TOKENS_A_CHARACTER * sum(len(text) for message in messages for text in message.values()))


def _logprobs_note(server: Server, wanted: int) -> str:
    most, with_ids = _LOGPROBS_FORMS[server.logprobs_form]
    if not most:
        return f"{server.host} refuses log-probabilities: deepdistill asks without them"
    if not with_ids:
        return f"{server.host} names no token ids: its log-probabilities cannot be kept"
    return f"{server.host} gives {min(wanted, most)} log-probabilities a token, not {wanted}"


@dataclass
class _Pending:
    """One request on its way: the estimated size of its prompt in tokens, and the replies that broke off."""

    request: Request
    n_prompt: int
    started: float
    broken: list[StreamedReply] = field(default_factory=list)

    def completion(self, reply: StreamedReply, *, not_sent: frozenset[str]) -> Completion:
        """Return the answer to a request that went out without some fields of the sampling."""
        answer = reply.completion(time.monotonic() - self.started, self.n_prompt)
        return replace(answer, lost_tokens=self._lost_tokens, not_sent=not_sent)

    def failed(self, error: str) -> Completion:
        """Return a failure, with the tokens that its attempts brought: they may have to be paid for."""
        seconds = time.monotonic() - self.started
        return Completion("", None, None, "error", 0, 0, 0, seconds, error=error, lost_tokens=self._lost_tokens)

    @property
    def _lost_tokens(self) -> tuple[int, int]:
        """Tokens of prompt and completion in replies that broke off."""
        n_completion = sum(reply.n_tokens for reply in self.broken)
        return sum(reply.n_total(self.n_prompt) for reply in self.broken) - n_completion, n_completion
