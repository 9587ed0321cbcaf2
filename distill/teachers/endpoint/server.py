"""One server of a teacher: how it is asked, what its answers mean, and whether it works.

The API key comes from the environment alone and appears in no file, message or log.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from email.utils import parsedate_to_datetime
from functools import cache
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import httpx

from ....errors import TeacherError, UsageError
from ....localrun.core.printable import printable
from .concurrency import AdaptiveConcurrency
from .stream import BrokenReply, RefusedReply, StreamedReply, read_error, read_reply

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
    asked again; `down` says that nothing listens there, `hung_up` that it closed the connection without a word,
    `at_once` that there is nothing to wait for; `reply` is what it sent until it broke off.
    """

    def __init__(
        self,
        reason: str,
        *,
        status: int | None = None,
        retry_after: float | None = None,
        down: bool = False,
        hung_up: bool = False,
        at_once: bool = False,
        reply: StreamedReply | None = None,
    ) -> None:
        super().__init__(reason)
        self.at_once = at_once
        self.status, self.retry_after, self.down, self.hung_up = status, retry_after, down, hung_up
        self.reply = reply


class Refused(Exception):
    """This request can never succeed; others may.

    `reply` is what came before the server ended it; `refusal` is what the server said if it did not even begin.
    """

    def __init__(self, reason: str, reply: StreamedReply | None = None, *, refusal: str = "") -> None:
        super().__init__(reason)
        self.reply, self.refusal = reply, refusal


class Server:
    """An address such as https://HOST/v1. It is down after a failed connection, or after many failures in a row."""

    def __init__(self, base_url: str, clock: Callable[[], float] = time.monotonic) -> None:
        """Check the address, without asking it.

        Raises:
            UsageError: `code` "bad-address", "password-in-address" or "bad-key".
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
        self._query = f"?{parts.query}" if parts.query else ""  # Azure: ?api-version=…
        path = parts.path.rstrip("/").removesuffix("/chat/completions").rstrip("/")
        self.url, self.host = f"{parts.scheme}://{parts.netloc}{path}", parts.netloc
        self._key = api_key(parts.hostname)
        if self._key and not (self._key.isascii() and self._key.isprintable()):
            hint = "copy it again: a key has only letters, digits and signs"
            raise UsageError("the API key has characters that no key has", hint, code="bad-key")
        _take_brackets_off_no_proxy()
        is_azure = parts.hostname.endswith(".azure.com")
        key_header = {"api-key": self._key} if is_azure else {"Authorization": f"Bearer {self._key}"}
        self.headers = {name: value for name, value in key_header.items() if value} if self._key else {}
        self.n_in_flight = 0
        self.logprobs_form = 0
        """Which way of asking for log-probabilities it accepts: an index into the caller's list."""
        self.logprobs_taken = False
        """Whether it has answered a request for log-probabilities in that way."""
        self._clock, self._heard_at = clock, clock()
        self._n_failed, self._rests_until, self._rest_s = 0, 0.0, 1.0
        self._has_answered = False

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
        self._n_failed, self._rest_s, self._has_answered = 0, 1.0, True

    def list_models(self) -> list[str]:
        """Return the names of the models that it serves; empty if it does not list them.

        Raises:
            Retryable: it is down or busy.
            TeacherError: `code` "server-refuses": it refuses the key.
        """
        try:
            response = httpx.get(
                self._at("models"),
                headers=self.headers,
                timeout=httpx.Timeout(10.0, connect=CONNECT_S),
                verify=tls_context(),
            )
        except httpx.RequestError as error:
            raise Retryable(_reason(error), down=True) from None
        except (ImportError, httpx.InvalidURL, ValueError) as error:  # httpx reads the environment's proxies
            hint = "check HTTPS_PROXY, ALL_PROXY and NO_PROXY; for SOCKS, pip install 'httpx[socks]'"
            raise TeacherError(f"a proxy setting cannot be used: {error}", hint, code="proxy-unusable") from error
        if response.status_code == 429 or response.status_code >= 500:
            wait = min(retry_after(response.headers) or 1.0, 5.0)
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
                client.stream("POST", self._at("chat/completions"), json=body, headers=self.headers) as response,
            ):
                if response.status_code != 200:
                    self._refuse(response, await read_error(response))
                if "text/html" in response.headers.get("content-type", "") and not self._has_answered:
                    hint = "is this the address of the API? It usually ends in /v1"
                    raise TeacherError(f"{self.url} answers with a web page", hint, code="not-an-api")
                concurrency.accepted()

                def heard(n_tokens: int) -> None:
                    deadline.reschedule(loop.time() + timeout_s)
                    self._heard_at = self._clock()
                    concurrency.heard(n_tokens)

                limit = body.get("max_tokens") or body.get("max_completion_tokens") or 0
                await read_reply(response, reply, max_tokens=int(limit), on_tokens=heard)
        except RefusedReply as error:
            raise Refused(self._redact(str(error)), reply) from None
        except (TimeoutError, httpx.RequestError, BrokenReply) as error:
            if reply.finish_reason not in ("stop", "length"):  # otherwise only the usage is missing
                raise self._retryable(error, started, reply) from None
        return reply

    def _at(self, path: str) -> str:
        return f"{self.url}/{path}{self._query}"

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

    def _refuse(self, response: httpx.Response, data: bytes) -> None:
        """Raise what a status other than 200 means; `data` is what came with it."""
        refusal, field = _error_text(data)
        status, text = response.status_code, self._redact(refusal)
        if status in (408, 409, 429) or status >= 500:
            raise Retryable(f"HTTP {status}: {text}", status=status, retry_after=retry_after(response.headers))
        if status in _FATAL:
            raise self._fatal(status, text)
        if 300 <= status < 400:
            place = response.headers.get("location", "elsewhere")
            hint = "give the address that it names, up to /v1"
            raise TeacherError(f"{self.host} has moved to {printable(place)[:200]}", hint, code="server-moved")
        raise Refused(f"HTTP {status}: {text}", refusal=f"{text} {field}")

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


def _take_brackets_off_no_proxy() -> None:
    """Write IPv6 addresses in NO_PROXY as httpx takes them: `[::1]`, as other programs have it, breaks it off."""
    for name in ("no_proxy", "NO_PROXY"):
        if "[" in (value := os.environ.get(name, "")):
            os.environ[name] = re.sub(r"\[([\da-fA-F:.]+)\](:\d+)?", r"\1", value)


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


def retry_after(headers: httpx.Headers) -> float | None:
    """Return the seconds that Retry-After asks for, given as a number or as a date."""
    value = headers.get("retry-after")
    if not value:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        now = headers.get("date")  # the server's own clock, which ours may not agree with
        since = parsedate_to_datetime(now).timestamp() if now else time.time()
        return max(0.0, parsedate_to_datetime(value).timestamp() - since)
    except (TypeError, ValueError):
        return None


def _error_text(data: bytes) -> tuple[str, str]:
    """Return a refusal on one line, and the name of the field that it is about, if it says that apart."""
    text, field = data.decode(errors="replace"), ""
    with suppress(ValueError, RecursionError):
        body = json.loads(data)
        error = (body.get("error") or body.get("detail") or body) if isinstance(body, dict) else body  # detail: FastAPI
        text = str(error.get("message", error) if isinstance(error, dict) else error)
        field = str(error.get("param") or "") if isinstance(error, dict) else ""
    return printable(" ".join(text.split())[:300]), field


def _reason(error: httpx.RequestError) -> str:
    """Return what went wrong with a connection: some of httpx's errors have no text."""
    kind = {"ReadTimeout": "the server fell silent", "ConnectTimeout": "no connection in time"}.get(
        type(error).__name__
    )
    text = kind or " ".join(str(error).split()) or type(error).__name__
    proxy = _proxy_of(error.request.url) if isinstance(error, (httpx.ConnectError, httpx.ProxyError)) else None
    return f"{text} (through the proxy {proxy})" if proxy else text


def _proxy_of(url: httpx.URL) -> str | None:
    """Return the address of the proxy that the environment names for a server, without its password."""
    proxies = getproxies()
    named = proxies.get(url.scheme) or proxies.get("all")
    return None if not named or proxy_bypass(url.host) else urlsplit(named).netloc.rpartition("@")[2]
