"""A teacher behind any OpenAI-compatible server: vLLM, SGLang, llama-server, `transformers serve`, the DeepSeek API.

Answers stream, so that a connection cut in the middle is noticed and asked again instead of being taken for a short
answer, and a runaway answer can be cut. What can succeed later is tried again, with growing pauses or as long as the
server asks for; what cannot fails that request alone; what no request can survive (a refused key, a server that is
down) stops the teacher, after the requests in flight have ended: what was paid for is handed over.

The requests of a call are coroutines on an event loop in a thread of its own. A place is free again once its answer has
been taken by the caller, so that no more is drawn than the caller has seen the answers of.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress

import httpx
import tenacity

from ....errors import TeacherError, UsageError
from ....localrun.core.generation import Completion, Message, Sampling, TopLogprobs
from ...records import Request
from ..base import Teacher
from .concurrency import Pace, RateLimit
from .retry import FIRST_ATTEMPTS, Asker, Endpoint, backoff, is_absent
from .scoring import Scorer
from .server import CONNECT_S, Retryable, Server, tls_context

_SCORED_AT_ONCE = 16  # requests, unless the user fixes how many
_LOOK_S = 0.25


class EndpointTeacher(Teacher):
    """One model on one or more servers: `http://a/v1,http://b/v1`. Each request goes to the least busy that is well.

    `concurrency` fixes the number of requests at once; None finds the best one. `timeout_s` is the longest silence of
    a server, in seconds; `max_rpm` and `max_tpm` are requests and tokens a minute, to all servers together.
    """

    backend = "endpoint"

    def __init__(
        self,
        addresses: str,
        *,
        model: str | None = None,
        concurrency: int | None = None,
        timeout_s: float = 300.0,
        max_rpm: int | None = None,
        max_tpm: int | None = None,
        max_backoff_s: float = 60.0,
    ) -> None:
        """Find the servers and their model.

        Raises:
            TeacherError: nobody answers there, the key is refused, or the model is not clear.
            UsageError: an address or a number is off.
        """
        for name, number in (("concurrency", concurrency), ("max_rpm", max_rpm), ("max_tpm", max_tpm)):
            if number is not None and number < 1:
                raise UsageError(f"{name} is at least 1, not {number}")
        servers = [Server(address) for address in split_addresses(addresses)]
        self.model = _find_model(servers, model)
        self.name = f"{self.model} at {', '.join(server.host for server in servers)}"
        self._endpoint = Endpoint(
            servers=servers,
            model=self.model,
            pace=Pace(concurrency),
            rpm=RateLimit(max_rpm),
            tpm=RateLimit(max_tpm),
            timeout_s=timeout_s,
            max_backoff_s=max_backoff_s,
        )
        self.n_parallel = self._endpoint.pace.level
        self._scorers = [Scorer(server, self.model, timeout_s) for server in servers]
        self._n_scored_at_once = concurrency or _SCORED_AT_ONCE

    def generate(
        self, requests: Iterable[Request], sampling: Sampling, *, top_logprobs: int = 0
    ) -> Iterator[tuple[int, Completion]]:
        """Yield (index, completion) as answers arrive. Closing the iterator drops what is in flight."""
        run = EndpointRun(self._endpoint, requests, sampling, top_logprobs)
        # A daemon: an iterable that never returns must not hold up the end of the program.
        threading.Thread(target=run.work, daemon=True).start()
        fatal: BaseException | None = None
        try:
            while (result := run.results.get()) is not None:
                if isinstance(result, str):
                    self.on_note(result)
                elif isinstance(result, BaseException):
                    fatal = fatal or result
                else:
                    self.n_parallel = self._endpoint.pace.level
                    yield result
                    run.call(run.taken)
            if fatal is not None:
                raise fatal
        finally:
            run.call(run.cancel)
            run.ended.wait(1.0)

    def tokenize(self, text: str) -> list[int] | None:
        """Return the token ids of a text; None if the server does not tell them."""
        try:
            return self._scorers[0].tokens_of(text)
        except TeacherError:
            return None

    def score(self, messages: Sequence[Message], answer: str | Sequence[int], *, top_logprobs: int) -> TopLogprobs:
        """Return the `top_logprobs` most probable tokens at the place of each of the answer's, where it is vLLM."""
        return self._scorers[0].score(messages, answer, top_logprobs)

    def score_many(
        self, conversations: Sequence[tuple[Sequence[Message], Sequence[int]]], *, top_logprobs: int
    ) -> Iterator[tuple[int, TopLogprobs]]:
        """Yield (index, scores) as they come, several requests at once, the addresses in turn."""
        with ThreadPoolExecutor(self._n_scored_at_once) as pool:
            asked = {
                pool.submit(self._scorers[i % len(self._scorers)].score, messages, answer, top_logprobs): i
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
    """Return the addresses of a spec, each once: they are separated by commas."""
    return list(dict.fromkeys(address.strip() for address in spec.split(",") if address.strip())) or [spec]


def _is_listless(server: Server, error: Retryable) -> TeacherError:
    """Return what to say of a server that is there and cannot say what it serves."""
    what = f"{server.host} cannot list its models: {error}"
    return TeacherError(what, "try again when it is well, or name the model with --model")


def _find_model(servers: Sequence[Server], wanted: str | None) -> str:
    """Return the model to ask for: the one wanted, else the only one that the servers list.

    A server that is down is left out, if another answers.
    """

    def is_vital(error: BaseException) -> bool:
        """Say whether the list is worth waiting for: what a server serves that is there may be known."""
        return isinstance(error, Retryable) and (error.down or not wanted)

    names: set[str] = set()
    absent: list[TeacherError] = []
    for server in servers:
        retry = tenacity.Retrying(
            retry=tenacity.retry_if_exception(is_vital),
            stop=tenacity.stop_after_attempt(FIRST_ATTEMPTS),
            wait=backoff(1.0),
            reraise=True,
        )
        try:
            names.update(retry(server.list_models))
        except Retryable as error:
            if is_vital(error):
                server.has_failed(error)
                absent.append(is_absent(server, str(error)) if error.down else _is_listless(server, error))
    if len(absent) == len(servers):
        raise absent[0]
    if wanted:
        return wanted
    if len(names) == 1:
        return names.pop()
    hosts, is_one = ", ".join(server.host for server in servers), len(servers) == 1
    listed = ", ".join(sorted(names)[:20]) + (", …" if len(names) > 20 else "")
    if names:
        what = f"{hosts} {'serves' if is_one else 'serve'} {len(names)} models: {listed}"
    else:
        what = f"{hosts} {'does' if is_one else 'do'} not list {'its' if is_one else 'their'} models"
    raise TeacherError(what, "name one with --model")


class EndpointRun:
    """The requests of one call. `results` gets completions, notes, what ended the run before its time, at last None."""

    def __init__(self, endpoint: Endpoint, requests: Iterable[Request], sampling: Sampling, top_logprobs: int) -> None:
        self.results: queue.SimpleQueue[tuple[int, Completion] | str | BaseException | None] = queue.SimpleQueue()
        self.ended = threading.Event()
        self._endpoint, self._requests = endpoint, enumerate(requests)
        self._asker = Asker(endpoint, sampling, top_logprobs, self.results.put)
        self._loop = asyncio.new_event_loop()
        self._n_open = 0  # drawn and not taken by the caller
        self._was_full = False

    # Called from the caller's thread.

    def call(self, function: Callable[[], None]) -> None:
        """Have the loop call a function, if it still runs."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function)

    def cancel(self) -> None:
        """Drop everything that is in flight."""
        for task in asyncio.all_tasks(self._loop):
            task.cancel()

    def taken(self) -> None:
        """Take notice that the caller is done with an answer: its place is free."""
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
        # How long a server may be silent is for `Server.ask` to watch: httpx would take a comment for a sign of life.
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
            self._was_full = self._was_full or self._n_open >= self._endpoint.pace.level
            await self._asker.until(lambda: self._n_open < self._endpoint.pace.level)
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
        """Let the pace look at how it goes, now and then."""
        while True:
            await asyncio.sleep(_LOOK_S)
            self._endpoint.pace.look(self._n_open, self._was_full)
            self._was_full = self._n_open >= self._endpoint.pace.level
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
