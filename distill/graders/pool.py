"""Verify answers: find the final one in what a model said, and have it graded in a process that can be killed.

Graders (graders/, one a file) run on the main thread of worker processes, one for each core at most: math-verify gives
0 without a word elsewhere, and both it and some of reasoning-gym's scorers can run for ever on hostile input. A worker
that hangs or dies is replaced, and what it was asked is `unknown`.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from types import TracebackType
from typing import Any, Self

from ...errors import ModelError, UsageError
from ..records import NONE, Grade, Problem
from .answer import final_answer as final_answer
from .answer import is_number
from .base import Kind, kind_of

_LOADING_S = 120.0  # importing sympy or reasoning-gym on a cold, busy machine


class Grader:
    """Grades answers in worker processes, started when needed. Close it, or use it as a context manager.

    Threads may share it: each call has a worker to itself, and waits for one where all are busy.
    """

    def __init__(self, timeout_s: float = 10.0, n_workers: int | None = None) -> None:
        self.timeout_s = timeout_s
        self.n_workers = n_workers or os.cpu_count() or 1
        # The last to be idle comes first, so that a caller with one thread starts one process.
        self._idle: queue.LifoQueue[_Worker] = queue.LifoQueue()
        self._workers = [_Worker() for _ in range(self.n_workers)]
        for worker in self._workers:
            self._idle.put(worker)

    def grade(self, problem: Problem, content: str) -> Grade:
        """Return the verdict on a content: `unknown` without a reference answer, or if grading hangs or fails.

        Raises:
            UsageError: there is no such grader, its argument is off, or this system cannot confine the code it runs.
            ModelError: the grader's package is not installed, or no worker can be started.
        """
        if problem.grader == NONE:
            return Grade(_answer(problem, content), "unknown", "none", None)
        kind, _ = kind_of(problem.grader)
        answer = content.strip() or None if not kind.reads_answer else _answer(problem, content)
        if kind.needs_reference and problem.answer is None:
            return Grade(_answer(problem, content), "unknown", "none", None, "the problem has no reference answer")
        if answer is None:
            return Grade(None, "wrong", "grader", 0.0)
        request = {"problem": asdict(problem), "content": content, "answer": answer, "timeout_s": self.timeout_s}
        worker = self._idle.get()
        try:
            score, reason = worker.grade(problem.grader, request, self.timeout_s)
        finally:
            self._idle.put(worker)
        shown = _shown(kind, problem, content)
        if score is None:
            return Grade(shown, "unknown", "none", None, reason)
        return Grade(shown, "right" if score == 1.0 else "wrong", "grader", score)

    def grade_many(self, items: Iterable[tuple[Problem, str]]) -> Iterator[Grade]:
        """Yield the verdicts on many contents in their order, with every worker busy."""
        with ThreadPoolExecutor(self.n_workers) as threads:
            yield from threads.map(lambda item: self.grade(*item), items)

    def close(self) -> None:
        """Kill the workers. The next grade starts others."""
        for worker in self._workers:
            worker.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def check_grader(grader: str) -> None:
    """Check a grader's name.

    Raises:
        UsageError: there is no such grader.
    """
    if grader != NONE:
        kind_of(grader)


def _answer(problem: Problem, content: str) -> str | None:
    """Return the final answer, in the form that the reference has."""
    gold = problem.answer
    numeric, multiline = gold is not None and is_number(gold), gold is None or "\n" in gold.strip()
    answer = final_answer(content, numeric=numeric, multiline=multiline)
    if answer and gold is not None and gold.rstrip().endswith(".") and not answer.endswith("."):
        answer += "."  # a sentence was asked for, and its full stop read as the content's
    return answer


def _shown(kind: Kind, problem: Problem, content: str) -> str | None:
    """Return the answer as the trace shows it: the final one, and all of the content where that is what is graded."""
    return content.strip() if kind.module in ("code.python", "json_schema") else _answer(problem, content)


class _Worker:
    """One worker process: started when first asked, replaced when it hangs or dies. One thread uses it at a time."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None
        self._replies: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._loaded: set[str] = set()
        self._lock = threading.Lock()

    def grade(self, grader: str, request: dict[str, Any], timeout_s: float) -> tuple[float | None, str]:
        """Return the score, None if the grader cannot tell, hangs or dies, and then the reason."""
        with self._lock:
            if self.process is None or self.process.poll() is not None:
                self._start()
            if grader not in self._loaded:
                self._load(grader)
            reply = self._exchange(request, timeout_s)
        if reply is None:
            return None, f"the grader did not answer within {timeout_s:g} s, or died"
        score = reply.get("score")
        return None if score is None else float(score), reply.get("reason", "")

    def stop(self) -> None:
        """Kill the process, if there is one, whatever it is at."""
        process = self.process
        if process is not None:
            process.kill()  # wakes the thread that waits for it
        with self._lock:
            self._stop()

    def _load(self, grader: str) -> None:
        kind, _ = kind_of(grader)
        reply = self._exchange({"load": grader}, _LOADING_S)
        if reply is None:
            raise ModelError(f"the grader {grader} does not start", "run python -m deepdistill.distill.graders.worker")
        if reply["error"] and reply["usage"]:
            raise UsageError(
                f"cannot grade with {grader}: {reply['error']}", "docs/verification.md describes each grader"
            )
        if reply["error"] and kind.module == "custom":
            raise UsageError(f"cannot import the grader {grader}: {reply['error']}", "run where its module lies")
        if reply["error"]:
            raise ModelError(f"cannot grade: {reply['error']}", "pip install 'deepdistill[teach]'")
        self._loaded.add(grader)

    def _exchange(self, message: dict[str, Any], timeout_s: float) -> dict[str, Any] | None:
        """Send a line and wait for the reply to it; on silence or death stop the worker and return None."""
        process = self.process
        assert process is not None
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(message, default=str) + "\n")
            process.stdin.flush()
            reply = self._replies.get(timeout=timeout_s)
        except (OSError, ValueError, queue.Empty):
            reply = None
        if reply is None:
            self._stop()
        return reply

    def _start(self) -> None:
        self._stop()
        command = [sys.executable, "-m", f"{__package__}.worker"]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, encoding="utf-8"
        )
        # A queue for each process: what a killed one still says must not answer the next one's question.
        self._replies = queue.Queue()
        threading.Thread(target=_read_replies, args=(self.process, self._replies), daemon=True).start()

    def _stop(self) -> None:
        process, self.process = self.process, None
        self._loaded.clear()
        if process is None:
            return
        process.kill()
        process.wait()
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()


def _read_replies(process: subprocess.Popen[str], replies: queue.Queue[dict[str, Any] | None]) -> None:
    """Pass a worker's lines on until it ends; None says that it has."""
    assert process.stdout is not None
    with process.stdout as lines:
        try:
            for line in lines:
                replies.put(json.loads(line))
        except ValueError:
            process.kill()  # half a line of a dying worker
    replies.put(None)
