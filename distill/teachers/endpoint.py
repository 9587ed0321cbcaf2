"""A teacher behind any OpenAI-compatible server: vLLM, SGLang, llama-server, `transformers serve`, the DeepSeek API.

Requests run on `concurrency` threads and stream, so that a connection cut in the middle is noticed and asked again
instead of being taken for a short answer. What can succeed later is tried again, with growing pauses or as long as the
server asks for; what cannot fails that request alone; what no request can survive (a refused key, a server that is
down) stops the teacher, after the requests in flight have ended: what was paid for is handed over.

The key comes from the environment alone and appears in no file, message or log.
"""

from __future__ import annotations

import os
import queue
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

import httpx
import tenacity

from ...errors import TeacherError, UsageError
from ...localrun.generation import Completion, Sampling
from .base import Request, Teacher
from .reply import BrokenReply, RefusedReply, Reply, read_reply

_ATTEMPTS = 8
_FIRST_ATTEMPTS = 3  # until the server has answered once: it may simply not be there
_LONGEST_WAIT_S = 600.0
_CONNECT_S = 5.0
_FATAL = {
    401: "set DEEPDISTILL_API_KEY (or DEEPSEEK_API_KEY / OPENAI_API_KEY for those hosts) to a key that it accepts",
    402: "the account has no credit left",
    403: "the key may not use this model",
    404: "check the address (it usually ends in /v1) and the model's name",
}


class _Retryable(Exception):
    """May succeed later. `retry_after` is what the server asked for, in seconds."""

    def __init__(self, reason: str, retry_after: float | None = None, down: bool = False) -> None:
        super().__init__(reason)
        self.retry_after = retry_after
        self.down = down


class _Refused(Exception):
    """This request can never succeed; others may."""


@dataclass
class _Run:
    """One `generate` call: what its threads share."""

    sampling: Sampling
    results: queue.Queue[tuple[int, Completion] | BaseException | None]
    todo: Iterator[tuple[int, Request]]
    lock: threading.Lock
    stop: threading.Event  # no new requests, and no more waiting
    abandon: threading.Event  # nobody listens: drop the streams too
    failures: int = 0  # requests given up in a row


class EndpointTeacher(Teacher):
    """A server at `base_url`, asked by `concurrency` threads. `timeout_s` is the longest silence, in seconds."""

    backend = "endpoint"

    def __init__(
        self,
        base_url: str,
        *,
        model: str | None = None,
        concurrency: int = 8,
        timeout_s: float = 300.0,
        max_backoff_s: float = 60.0,
    ) -> None:
        """Find the server and its model.

        Raises:
            TeacherError: nobody answers there, the key is refused, or the model is not clear.
            UsageError: the address or the concurrency is off.
        """
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(f"not an address of a server: {base_url!r}", "write https://HOST/v1")
        if parts.username or parts.password:
            raise UsageError("the address holds a password", "put the key in DEEPDISTILL_API_KEY instead")
        if concurrency < 1:
            raise UsageError(f"concurrency is at least 1, not {concurrency}")
        self.base_url = base_url.rstrip("/").removesuffix("/chat/completions")
        self.host, self.n_parallel, self.max_backoff_s = parts.netloc, concurrency, max_backoff_s
        self._key = _api_key(parts.hostname)
        self._answered = False
        self._client = httpx.Client(
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            timeout=httpx.Timeout(timeout_s, connect=min(_CONNECT_S, timeout_s), pool=None),
            limits=httpx.Limits(max_connections=concurrency + 1, max_keepalive_connections=concurrency + 1),
        )
        try:
            self.model = self._find_model(model)
        except BaseException:
            self.close()
            raise
        self.name = f"{self.model} at {self.host}"

    def generate(
        self, requests: Iterable[Request], sampling: Sampling, *, top_logprobs: int = 0
    ) -> Iterator[tuple[int, Completion]]:
        """Yield (index, completion) as answers arrive. Closing the iterator drops what is in flight."""
        run = _Run(
            sampling,
            queue.Queue(),
            enumerate(requests),
            threading.Lock(),
            threading.Event(),
            threading.Event(),
        )
        n_threads = self.n_parallel
        # Daemons: a server that hangs must not hold up the end of the program.
        for _ in range(n_threads):
            threading.Thread(target=self._work, args=(run,), daemon=True).start()
        fatal: BaseException | None = None
        try:
            while n_threads:
                result = run.results.get()
                if result is None:
                    n_threads -= 1
                elif isinstance(result, BaseException):
                    fatal = fatal or result
                else:
                    yield result
            if fatal is not None:
                raise fatal
        finally:
            run.stop.set()
            run.abandon.set()

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _find_model(self, wanted: str | None) -> str:
        """Return the model to ask for: the one wanted, else the only one that the server lists."""
        run_retry = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_Retryable),
            stop=tenacity.stop_after_attempt(_FIRST_ATTEMPTS),
            wait=_wait(1.0),
            reraise=True,
        )
        try:
            response = run_retry(self._get_models)
        except _Retryable as error:
            raise self._down(str(error)) from None
        if response.status_code in (401, 403):
            raise self._fatal(response.status_code, response.text)
        names = _model_names(response)
        if wanted:
            return wanted
        if len(names) == 1:
            return names[0]
        listed = ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
        what = f"{self.host} serves {len(names)} models: {listed}" if names else f"{self.host} does not list its models"
        raise TeacherError(what, "name one with --model")

    def _get_models(self) -> httpx.Response:
        try:
            response = self._client.get(f"{self.base_url}/models", timeout=httpx.Timeout(10.0, connect=_CONNECT_S))
        except httpx.TransportError as error:
            raise _Retryable(_reason(error)) from None
        if response.status_code == 429 or response.status_code >= 500:
            raise _Retryable(f"HTTP {response.status_code}", min(_retry_after(response) or 1.0, 5.0))
        return response

    def _work(self, run: _Run) -> None:
        """Take requests until there are no more, or the run stops."""
        try:
            while not run.stop.is_set():
                with run.lock:
                    index, request = next(run.todo, (-1, None))
                if request is None:
                    return
                completion = self._answer(run, request)
                if completion is not None:
                    run.results.put((index, completion))
        except BaseException as error:  # handed to the caller's thread, which raises it
            run.stop.set()
            run.results.put(error)
        finally:
            run.results.put(None)

    def _answer(self, run: _Run, request: Request) -> Completion | None:
        """Ask until there is an answer or no hope of one; None if the run ended meanwhile."""
        retry = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_Retryable),
            stop=lambda state: run.stop.is_set() or self._enough(state),
            wait=_wait(self.max_backoff_s),
            sleep=tenacity.sleep_using_event(run.stop),
            reraise=True,
        )
        started = time.monotonic()
        try:
            reply: Reply = retry(self._ask, run, request)
        except _Retryable as error:
            if run.stop.is_set():
                return None
            run.failures += 1
            if error.down and not self._answered:
                raise self._down(str(error)) from None
            if run.failures >= max(4, self.n_parallel):
                raise TeacherError(
                    f"{self.host} gave up {run.failures} requests in a row, the last with: {error}",
                    "what was answered is kept; run the same command again when it is well",
                ) from None
            return _failed(f"after {_ATTEMPTS} attempts: {error}", time.monotonic() - started)
        except _Refused as error:
            return _failed(str(error), time.monotonic() - started)
        run.failures = 0
        return reply.completion(seconds=time.monotonic() - started)

    def _enough(self, state: tenacity.RetryCallState) -> bool:
        error = state.outcome.exception() if state.outcome else None
        is_absent = isinstance(error, _Retryable) and error.down and not self._answered
        return state.attempt_number >= (_FIRST_ATTEMPTS if is_absent else _ATTEMPTS)

    def _ask(self, run: _Run, request: Request) -> Reply:
        """Send one request and read its answer to the end."""
        sampling = run.sampling
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [dict(message) for message in request.messages],
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_tokens,
            "seed": request.seed,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        # Not part of OpenAI's API: only for who asks for them.
        body |= {"top_k": sampling.top_k} if sampling.top_k > 0 else {}
        body |= {"min_p": sampling.min_p} if sampling.min_p > 0 else {}
        try:
            with self._client.stream("POST", f"{self.base_url}/chat/completions", json=body) as response:
                if response.status_code != 200:
                    response.read()
                    self._refuse(response)
                reply = read_reply(response, run.abandon)
        except BrokenReply as error:
            raise _Retryable(self._redact(str(error))) from None
        except RefusedReply as error:
            raise _Refused(self._redact(str(error))) from None
        except httpx.TransportError as error:
            raise _Retryable(
                _reason(error), down=isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout))
            ) from None
        self._answered = True
        return reply

    def _refuse(self, response: httpx.Response) -> None:
        """Raise what a status other than 200 means."""
        status, text = response.status_code, self._redact(_error_text(response))
        if status in (408, 409, 429) or status >= 500:
            raise _Retryable(f"HTTP {status}: {text}", _retry_after(response))
        if status in _FATAL:
            raise self._fatal(status, text)
        raise _Refused(f"HTTP {status}: {text}")

    def _fatal(self, status: int, text: str) -> TeacherError:
        text = " ".join(self._redact(text).split())[:200]
        return TeacherError(f"{self.host} answers HTTP {status}: {text}", _FATAL[status])

    def _down(self, reason: str) -> TeacherError:
        return TeacherError(
            f"no answer from {self.base_url}: {reason}", "is the server running, and is this its address?"
        )

    def _redact(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


def _api_key(host: str) -> str | None:
    """Return the key for a host: a vendor's own key goes to that vendor alone, ours to whoever the user names."""
    key = os.environ.get("DEEPDISTILL_API_KEY")
    for domain, variable in (("openai.com", "OPENAI_API_KEY"), ("deepseek.com", "DEEPSEEK_API_KEY")):
        if not key and (host == domain or host.endswith(f".{domain}")):
            key = os.environ.get(variable)
    return key.strip() if key else None


def _wait(longest_s: float) -> Callable[[tenacity.RetryCallState], float]:
    """Return tenacity's wait: what the server asked for, else pauses that double from half a second, with jitter."""

    def wait(state: tenacity.RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        if isinstance(error, _Retryable) and error.retry_after is not None:
            return min(error.retry_after, _LONGEST_WAIT_S)
        # Jitter, so that requests that failed together do not come back together.
        return min(longest_s, 0.5 * 2.0 ** (state.attempt_number - 1)) * random.uniform(0.5, 1.0)

    return wait


def _retry_after(response: httpx.Response) -> float | None:
    """Return the seconds that Retry-After asks for, given as a number or as a date."""
    value = response.headers.get("retry-after")
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


def _model_names(response: httpx.Response) -> list[str]:
    try:
        return [str(entry["id"]) for entry in response.json()["data"]]
    except (ValueError, KeyError, TypeError):
        return []


def _error_text(response: httpx.Response) -> str:
    try:
        body = response.json()
        error = body.get("error", body)
        text = error.get("message", error) if isinstance(error, dict) else error
    except (ValueError, AttributeError):
        text = response.text
    return " ".join(str(text).split())[:300]


def _reason(error: httpx.TransportError) -> str:
    """Say what went wrong with a connection: httpx leaves some of its errors without a text."""
    kind = {"ReadTimeout": "the server fell silent", "ConnectTimeout": "no connection in time"}.get(
        type(error).__name__
    )
    return kind or " ".join(str(error).split()) or type(error).__name__


def _failed(error: str, seconds: float) -> Completion:
    return Completion("", None, None, "error", 0, 0, 0, seconds, error=error)
