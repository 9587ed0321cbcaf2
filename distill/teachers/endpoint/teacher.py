"""A teacher behind any OpenAI-compatible server: vLLM, SGLang, llama-server, `transformers serve`, the DeepSeek API.

Answers stream, so that a connection cut in the middle is noticed and asked again instead of passing for a short answer,
and a runaway answer can be cut. An error that no request can survive (a refused key, a server that is down) stops the
teacher after the requests in flight have ended: every answer that was paid for is handed over.

The requests of a call are coroutines on an event loop in a thread of their own. A place is free again once the caller
has taken its answer, so that a teacher never draws more requests than the caller needs.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from itertools import count
from typing import TypedDict, Unpack

import httpx

from ....errors import TeacherError, UsageError
from ....localrun.core.generation import Completion, Message, Sampling, TopLogprobs
from ....localrun.core.text import listed
from ...recipe.gathering import RequestRecipe
from ...records import Request
from ..base import Teacher
from .body import RequestBody
from .concurrency import AdaptiveConcurrency, RateLimit
from .retry import FIRST_ATTEMPTS, Asker, Endpoint, backoff, is_absent
from .scoring import Scorer
from .server import CONNECT_S, Retryable, Server, tls_context

_SCORED_AT_ONCE = 16  # requests, unless the user fixes how many


class Rates(TypedDict, total=False):
    """What all servers together are asked for in a minute, at most."""

    max_rpm: int | None
    """Requests."""
    max_tpm: int | None
    """Tokens."""


class EndpointTeacher(Teacher):
    """One model on one or more servers: `http://a/v1,http://b/v1`. Each request goes to the least busy one that works.

    `concurrency` fixes the number of requests at once; None finds the best number. `timeout_s` is the longest silence
    of a server, in seconds; `max_rpm` and `max_tpm` limit requests and tokens a minute, to all servers together.
    """

    backend = "endpoint"

    def __init__(
        self,
        addresses: str,
        *,
        model: str | None = None,
        concurrency: int | AdaptiveConcurrency | None = None,
        timeout_s: float = 600.0,
        max_backoff_s: float = 60.0,
        request: RequestRecipe | None = None,
        **rates: Unpack[Rates],
    ) -> None:
        """Find the servers and their model.

        Raises:
            TeacherError: `code` "server-down", "server-refuses", "models-not-listed" or "model-unclear".
            UsageError: `code` "bad-address", "bad-key", "number-out-of-range" or "thinking-unknown".
        """
        max_rpm, max_tpm = rates.get("max_rpm"), rates.get("max_tpm")
        for name, number in (("concurrency", concurrency), ("max_rpm", max_rpm), ("max_tpm", max_tpm)):
            if isinstance(number, int) and number < 1:
                raise UsageError(f"{name} is at least 1, not {number}", code="number-out-of-range")
        if not isinstance(concurrency, AdaptiveConcurrency):
            concurrency = AdaptiveConcurrency(concurrency)
        servers = [Server(address) for address in split_addresses(addresses)]
        self.model = _find_model(servers, model)
        self.name = f"{self.model} at {', '.join(server.host for server in servers)}"
        body = RequestBody(self.model, request, host=servers[0].host)
        self._endpoint = Endpoint(
            servers, body, concurrency, RateLimit(max_rpm), RateLimit(max_tpm), timeout_s, max_backoff_s
        )
        self._scorers = [Scorer(server, self.model, timeout_s) for server in servers]
        self._n_scored_at_once = concurrency.level if concurrency.is_fixed else _SCORED_AT_ONCE

    @property
    def n_parallel(self) -> int:  # type: ignore[override]
        """Requests at once, as found so far."""
        return self._endpoint.concurrency.level

    def generate(
        self, requests: Iterable[Request], sampling: Sampling, *, top_logprobs: int = 0
    ) -> Iterator[tuple[int, Completion]]:
        """Yield (index, completion) as answers arrive. Closing the iterator drops what is in flight."""
        run = _EndpointRun(self._endpoint, requests, sampling=sampling, top_logprobs=top_logprobs)
        # A daemon thread: an iterable that never returns must not hold up the end of the program.
        threading.Thread(target=run.work, daemon=True).start()
        fatal: BaseException | None = None
        try:
            while (result := run.results.get()) is not None:
                if isinstance(result, str):
                    self.on_note(result)
                elif isinstance(result, BaseException):
                    fatal = fatal or result
                else:
                    yield result
                    run.call(run.taken)
            if fatal is not None:
                raise fatal
        finally:
            run.call(run.cancel)
            run.ended.wait(1.0)

    def tokenize(self, text: str) -> list[int] | None:
        """Return the token ids of a text; None if the server does not give them."""
        try:
            return self._scorers[0].tokens_of(text)
        except TeacherError:
            return None

    def score(self, messages: Sequence[Message], answer: str | Sequence[int], *, top_logprobs: int) -> TopLogprobs:
        """Return the `top_logprobs` most probable tokens at each place of the answer, if the server is vLLM."""
        return self._scorers[0].score(messages, answer, k=top_logprobs)

    def score_many(
        self, conversations: Sequence[tuple[Sequence[Message], Sequence[int]]], *, top_logprobs: int
    ) -> Iterator[tuple[int, TopLogprobs]]:
        """Yield (index, scores) as they come, several requests at once, the addresses in turn."""
        with ThreadPoolExecutor(self._n_scored_at_once) as pool:
            asked = {
                pool.submit(self._scorers[i % len(self._scorers)].score, messages, answer, k=top_logprobs): i
                for i, (messages, answer) in enumerate(conversations)
            }
            try:
                for done in as_completed(asked):
                    yield asked[done], done.result()
            finally:
                for future in asked:
                    future.cancel()

    def close(self) -> None:
        """Close the connections that scoring keeps."""
        for scorer in self._scorers:
            scorer.close()


def split_addresses(spec: str) -> list[str]:
    """Return the addresses in a spec, which commas separate, each once."""
    return list(dict.fromkeys(address.strip() for address in spec.split(",") if address.strip())) or [spec]


def _find_model(servers: Sequence[Server], wanted: str | None) -> str:
    """Return the model to ask for: the one wanted, or else the only one that the servers list.

    A server that is down is left out if another answers.
    """
    names: set[str] = set()
    errors: list[TeacherError] = []
    for server in servers:
        try:
            names.update(_listed_models(server, is_vital=not wanted))
        except TeacherError as error:
            if error.code == "server-refuses":
                raise
            errors.append(error)
    if len(errors) == len(servers):
        raise errors[0]
    if wanted:
        return wanted
    if len(names) == 1:
        return names.pop()
    hosts = listed(server.host for server in servers)
    models = f"{len(names)} models, {listed(sorted(names), most=20)}" if names else "no list of models"
    raise TeacherError(
        f"{hosts} {'has' if len(servers) == 1 else 'have'} {models}", "name one with --model", code="model-unclear"
    )


def _listed_models(server: Server, *, is_vital: bool) -> list[str]:
    """Return the models that a server lists. A server that is busy is worth waiting for only if the list is vital.

    Raises:
        TeacherError: `code` "server-down", "server-refuses" or "models-not-listed".
    """
    for attempt in count(1):
        try:
            return server.list_models()
        except Retryable as error:
            if not (error.down or is_vital):
                break
            if attempt == FIRST_ATTEMPTS:
                server.has_failed(error)
                raise is_absent(server, str(error)) if error.down else _not_listed(server, str(error)) from None
            time.sleep(backoff(attempt, error.retry_after, longest_s=1.0))
    return []


def _not_listed(server: Server, reason: str) -> TeacherError:
    return TeacherError(
        f"{server.host} cannot list its models: {reason}",
        "try again when it works, or name the model with --model",
        code="models-not-listed",
    )


class _EndpointRun:
    """One `generate` call: draws requests as places come free, has them answered on an event loop, hands answers over.

    `results` gets completions, notes for the user, the error that ended the run early, and at last None. What the
    caller's thread says comes back by `call`.
    """

    def __init__(
        self, endpoint: Endpoint, requests: Iterable[Request], *, sampling: Sampling, top_logprobs: int
    ) -> None:
        self.results: queue.SimpleQueue[tuple[int, Completion] | str | BaseException | None] = queue.SimpleQueue()
        self.ended = threading.Event()
        self._endpoint, self._requests = endpoint, enumerate(requests)
        self._asker = Asker(endpoint, sampling, top_logprobs=top_logprobs, on_note=self.results.put)
        self._loop = asyncio.new_event_loop()
        self._n_open = 0  # drawn and not taken by the caller
        self._was_full = False

    # Called from the caller's thread.

    def call(self, function: Callable[[], None]) -> None:
        """Call a function on the loop, if it still runs."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function)

    def cancel(self) -> None:
        """Drop everything that is in flight."""
        for task in asyncio.all_tasks(self._loop):
            task.cancel()

    def taken(self) -> None:
        """Free the place of an answer that the caller is done with."""
        self._n_open -= 1
        self._asker.changed.set()

    # Runs in a thread of its own.

    def work(self) -> None:
        """Answer every request, then put None."""
        try:
            with asyncio.Runner(loop_factory=lambda: self._loop) as runner, suppress(asyncio.CancelledError):
                runner.run(self._work())
        except BaseException as error:  # handed to the caller's thread, which raises it
            self.results.put(error)
        finally:
            self.results.put(None)
            self.ended.set()

    async def _work(self) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        # `Server.ask` watches how long a server is silent: httpx would take a comment for a sign of life.
        timeout = httpx.Timeout(None, connect=min(CONNECT_S, self._endpoint.timeout_s))
        async with httpx.AsyncClient(limits=limits, timeout=timeout, verify=tls_context()) as client:
            watcher = asyncio.create_task(self._watch())
            try:
                async with asyncio.TaskGroup() as group:
                    async for index, request in self._drawn():
                        group.create_task(self._answer_and_put(client, index, request))
            finally:
                watcher.cancel()

    async def _drawn(self) -> AsyncIterator[tuple[int, Request]]:
        """Yield (index, request) as places come free, until there are no more or the run stops."""
        while True:
            self._was_full = self._was_full or self._n_open >= self._endpoint.concurrency.level
            await self._asker.until(lambda: self._n_open < self._endpoint.concurrency.level)
            if self._asker.stopped.is_set():
                return
            try:
                drawn = next(self._requests, None)
            except BaseException as error:  # the caller's own
                self._stop(error)
                return
            if drawn is None:
                return
            self._n_open += 1
            yield drawn

    async def _watch(self) -> None:
        """Have the number of requests at once adapted now and then."""
        concurrency = self._endpoint.concurrency
        while True:
            await asyncio.sleep(concurrency.look_every_s)
            concurrency.look(self._n_open, self._was_full)
            self._was_full = self._n_open >= concurrency.level
            self._asker.changed.set()

    def _stop(self, error: BaseException) -> None:
        """Draw no more and wait for nothing; what is in flight may end."""
        self.results.put(error)
        self._asker.stopped.set()
        self._asker.changed.set()

    async def _answer_and_put(self, client: httpx.AsyncClient, index: int, request: Request) -> None:
        try:
            completion = await self._asker.answer(client, request)
        except Exception as error:
            self._stop(error)
            return
        if completion is not None:
            self.results.put((index, completion))
