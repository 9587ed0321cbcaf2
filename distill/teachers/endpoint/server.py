"""One server of a teacher: how it is asked, what its answers mean, and whether it works.

The API key comes from the environment alone and appears in no file, message or log.
"""

from __future__ import annotations

import asyncio
import os
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from email.utils import parsedate_to_datetime
from functools import cache
from typing import Any
from urllib.parse import urlsplit

import httpx

from ....errors import TeacherError, UsageError
from .concurrency import AdaptiveConcurrency
from .stream import BrokenReply, RefusedReply, StreamedReply, read_reply

CONNECT_S = 5.0
_STRIKES = 8  # failures in a row until an address counts as down
_LONGEST_REST_S = 60.0
_FATAL = {
    401: "set DEEPDISTILL_API_KEY (or DEEPSEEK_API_KEY, OPENAI_API_KEY for those hosts) to a key that it accepts",
    402: "add credit to the account",
    403: "use a key that may use this model",
    404: "check the address (it usually ends in /v1) and the model's name",
}


class Retryable(Exception):
    """May succeed later.

    `status` is the HTTP status of a server that refused to begin, `retry_after` the seconds after which it wants to be
    asked again; `down` says that nothing listens there, `hung_up` that it closed the connection without a word; `reply`
    is what it sent until it broke off.
    """

    def __init__(
        self,
        reason: str,
        *,
        status: int | None = None,
        retry_after: float | None = None,
        down: bool = False,
        hung_up: bool = False,
        reply: StreamedReply | None = None,
    ) -> None:
        super().__init__(reason)
        self.status, self.retry_after, self.down, self.hung_up = status, retry_after, down, hung_up
        self.reply = reply


class Refused(Exception):
    """This request can never succeed; others may. `reply` is what came before the server ended it."""

    def __init__(self, reason: str, reply: StreamedReply | None = None) -> None:
        super().__init__(reason)
        self.reply = reply


class Server:
    """An address such as https://HOST/v1. It is down after a failed connection, or after many failures in a row."""

    def __init__(self, base_url: str, clock: Callable[[], float] = time.monotonic) -> None:
        """Check the address, without asking it.

        Raises:
            UsageError: `code` "bad-address" or "password-in-address".
        """
        try:
            parts = urlsplit(base_url)
            httpx.URL(base_url)
        except (ValueError, httpx.InvalidURL):
            raise _bad_address(base_url) from None
        if parts.username or parts.password:
            raise UsageError(
                "the address contains a password",
                "put the key in DEEPDISTILL_API_KEY instead",
                code="password-in-address",
            )
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise _bad_address(base_url)
        self.url, self.host = base_url.rstrip("/").removesuffix("/chat/completions"), parts.netloc
        self._key = api_key(parts.hostname)
        self.headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        self.n_in_flight = 0
        self.logprobs_form = 0
        """Which way of asking for log-probabilities it accepts: an index into the caller's list."""
        self.logprobs_taken = False
        """Whether it has answered a request for log-probabilities in that way."""
        self._clock, self._heard_at = clock, clock()
        self._n_failed, self._rests_until, self._rest_s = 0, 0.0, 1.0

    @property
    def is_down(self) -> bool:
        """Whether it has failed and not answered since."""
        return self._n_failed >= _STRIKES

    @property
    def may_be_asked(self) -> bool:
        """Whether it works, or its rest is over: then one request may try it."""
        rested = self._clock() >= self._rests_until
        return rested and (not self.is_down or self.n_in_flight == 0)

    def has_failed(self, error: Retryable) -> None:
        """Count a failed request: a server that is down rests, longer each time."""
        self._n_failed += _STRIKES if error.down else error.status != 429
        now, rest = self._clock(), error.retry_after or 0.0
        if self.is_down and now >= self._rests_until:  # those that fail together lengthen its rest once
            rest = max(rest, self._rest_s)
            self._rest_s = min(2 * self._rest_s, _LONGEST_REST_S)
        self._rests_until = max(self._rests_until, now + rest)

    def has_answered(self) -> None:
        """Count a request that succeeded."""
        self._n_failed, self._rest_s = 0, 1.0

    def list_models(self) -> list[str]:
        """Return the names of the models that it serves; empty if it does not list them.

        Raises:
            Retryable: it is down or busy.
            TeacherError: `code` "server-refuses": it refuses the key.
        """
        try:
            response = httpx.get(
                f"{self.url}/models",
                headers=self.headers,
                timeout=httpx.Timeout(10.0, connect=CONNECT_S),
                verify=tls_context(),
            )
        except httpx.RequestError as error:
            raise Retryable(_reason(error), down=True) from None
        if response.status_code == 429 or response.status_code >= 500:
            wait = min(_retry_after(response.headers) or 1.0, 5.0)
            raise Retryable(f"HTTP {response.status_code}", status=response.status_code, retry_after=wait)
        if response.status_code in (401, 403):
            raise self._fatal(response.status_code, response.text)
        try:
            return [str(entry["id"]) for entry in response.json()["data"]]
        except (ValueError, KeyError, TypeError):
            return []

    async def ask(
        self, client: httpx.AsyncClient, body: Mapping[str, Any], *, timeout_s: float, concurrency: AdaptiveConcurrency
    ) -> StreamedReply:
        """Send one request and read its answer to the end, or until it has run away.

        `timeout_s` is the longest time between two events that bring something: a comment that keeps the connection
        alive does not count. `concurrency` counts what arrives.

        Raises:
            Retryable: the same request may succeed later.
            Refused: it never can.
            TeacherError: no request can.
        """
        started, reply, loop = self._clock(), StreamedReply(), asyncio.get_running_loop()
        try:
            async with (
                asyncio.timeout(timeout_s) as deadline,
                client.stream("POST", f"{self.url}/chat/completions", json=body, headers=self.headers) as response,
            ):
                if response.status_code != 200:
                    await response.aread()
                    self._refuse(response)
                concurrency.accepted()

                def heard(n_tokens: int) -> None:
                    deadline.reschedule(loop.time() + timeout_s)
                    self._heard_at = self._clock()
                    concurrency.heard(n_tokens)

                await read_reply(response, reply, max_tokens=int(body["max_tokens"]), on_tokens=heard)
        except RefusedReply as error:
            raise Refused(self._redact(str(error)), reply) from None
        except (TimeoutError, httpx.RequestError, BrokenReply) as error:
            if reply.finish_reason not in ("stop", "length"):  # otherwise only the usage is missing
                raise self._retryable(error, started, reply) from None
        return reply

    def _retryable(self, error: Exception, started: float, reply: StreamedReply) -> Retryable:
        """Return what went wrong, and whether the server is down.

        It is if nobody can connect, or if it sent nothing to anybody for as long as this request waited.
        """
        if isinstance(error, TimeoutError):
            return Retryable("the server fell silent", down=self._heard_at < started, reply=reply)
        if isinstance(error, httpx.RequestError):
            is_absent = isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout))
            hung_up = isinstance(error, (httpx.RemoteProtocolError, httpx.ReadError)) and not reply.n_tokens
            return Retryable(self.reason_of(error), down=is_absent, hung_up=hung_up, reply=reply)
        return Retryable(self._redact(str(error)), reply=reply)

    def _refuse(self, response: httpx.Response) -> None:
        """Raise what a status other than 200 means."""
        status, text = response.status_code, self._redact(_error_text(response))
        if status in (408, 409, 429) or status >= 500:
            raise Retryable(f"HTTP {status}: {text}", status=status, retry_after=_retry_after(response.headers))
        if status in _FATAL:
            raise self._fatal(status, text)
        raise Refused(f"HTTP {status}: {text}")

    def _fatal(self, status: int, text: str) -> TeacherError:
        text = " ".join(self._redact(text).split())[:200]
        return TeacherError(f"{self.host} answers HTTP {status}: {text}", _FATAL[status], code="server-refuses")

    def reason_of(self, error: httpx.RequestError) -> str:
        """Return what went wrong with a connection, without the key."""
        return self._redact(_reason(error))

    def _redact(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


def _bad_address(base_url: str) -> UsageError:
    return UsageError(f"{base_url!r} is not the address of a server", "write https://HOST/v1", code="bad-address")


@cache
def tls_context() -> ssl.SSLContext:
    """Return the certificates to check servers with, read once: reading takes longer than many requests."""
    return httpx.create_ssl_context()


def least_busy(servers: Sequence[Server]) -> Server:
    """Return the server with the fewest requests in flight among those that work; among all if none does."""
    return min([s for s in servers if s.may_be_asked] or servers, key=lambda s: s.n_in_flight)


def api_key(host: str) -> str | None:
    """Return the key for a host: a vendor's own key goes to that vendor alone, ours to any host that the user names."""
    key = os.environ.get("DEEPDISTILL_API_KEY")
    for domain, variable in (("openai.com", "OPENAI_API_KEY"), ("deepseek.com", "DEEPSEEK_API_KEY")):
        if not key and (host == domain or host.endswith(f".{domain}")):
            key = os.environ.get(variable)
    return key.strip() if key else None


def _retry_after(headers: httpx.Headers) -> float | None:
    """Return the seconds that Retry-After asks for, given as a number or as a date."""
    value = headers.get("retry-after")
    if not value:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return None


def _error_text(response: httpx.Response) -> str:
    try:
        body = response.json()
        error = body.get("error") or body.get("detail") or body  # detail: FastAPI's own refusals
        text = error.get("message", error) if isinstance(error, dict) else error
    except (ValueError, AttributeError):
        text = response.text
    return " ".join(str(text).split())[:300]


def _reason(error: httpx.RequestError) -> str:
    """Return what went wrong with a connection: some of httpx's errors have no text."""
    kind = {"ReadTimeout": "the server fell silent", "ConnectTimeout": "no connection in time"}.get(
        type(error).__name__
    )
    return kind or " ".join(str(error).split()) or type(error).__name__
