"""One `generate` call of an endpoint teacher: draw requests as places come free, have them answered, hand over.

An event loop runs in a thread of its own. Answers go to the caller's thread through a queue; what the caller says comes
back by `call`.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import suppress

import httpx

from ....localrun.core.generation import Completion, Sampling
from ...records import Request
from .retry import Asker, Endpoint
from .server import CONNECT_S, tls_context

_LOOK_S = 0.25


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
