"""Verify answers in worker processes that can be killed.

Graders run on the main thread of a worker, at most one worker a core: on another thread math-verify silently returns 0,
and both it and some of reasoning-gym's scorers can run for ever on hostile input. A worker that hangs or dies is
replaced, and the answer that it was grading is `unknown`.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from dataclasses import asdict, replace
from typing import Any

from ...errors import ModelError, UsageError
from ...localrun.core.closes import Closes
from ...localrun.core.generation import Completion
from ..records import NONE, Grade, GradesAnswers, Problem, Trace
from . import json_value, label
from .answer import final_answer, is_number, is_refusal
from .base import CannotTell, Kind, kind_of

IN_REASONING = "the whole answer is in the reasoning (answer-in-reasoning)"
_LOADING_S = 120.0  # importing sympy or reasoning-gym on a cold, busy machine


class Grader(Closes):
    """Grades answers in worker processes, which start when they are needed. Close it, or use it in a `with` block.

    Threads may share a grader: each call has a worker to itself and waits while all are busy.
    """

    def __init__(self, timeout_s: float = 10.0, n_workers: int | None = None) -> None:
        self.timeout_s = timeout_s
        self.n_workers = n_workers or os.cpu_count() or 1
        # Last in, first out, so that a caller with one thread starts one process.
        self._idle: queue.LifoQueue[_Worker] = queue.LifoQueue()
        self._workers = [_Worker() for _ in range(self.n_workers)]
        for worker in self._workers:
            self._idle.put(worker)

    @property
    def processes(self) -> list[subprocess.Popen[str]]:
        """The worker processes that have been started and not been stopped."""
        return [worker.process for worker in self._workers if worker.process]

    def grade(self, problem: Problem, content: str) -> Grade:
        """Return the verdict on a content: `unknown` if the problem has no reference answer or grading fails.

        A problem may have several wordings of its reference (`aliases` in its metadata): a content is right by any.

        Raises:
            UsageError: `code` "no-such-grader"; "bad-grader" if its argument is invalid, its module cannot be imported,
                or this system cannot confine the code that it runs.
            ModelError: `code` "grader-failed": its package is not installed, or no worker can start.
        """
        if problem.grader == NONE:
            return Grade(_answer(problem, content), "unknown", "none", None)
        verdicts = []
        for reference in (problem.answer, *problem.metadata.get("aliases", ())):
            verdicts.append(self._grade(replace(problem, answer=reference), content))
            if verdicts[-1].verdict == "right":
                return verdicts[-1]
        return next((one for one in verdicts if one.verdict == "unknown"), verdicts[0])

    def _grade(self, problem: Problem, content: str) -> Grade:
        kind, _ = kind_of(problem.grader)
        answer = content.strip() or None if not kind.reads_answer else _answer(problem, content)
        if kind.needs_reference and problem.answer is None:
            return Grade(_answer(problem, content), "unknown", "none", None, "the problem has no reference answer")
        if answer is None:
            return Grade(None, "wrong", "grader", 0.0)
        if is_refusal(content):
            return Grade(None, "unknown", "none", None, "the reply is a refusal")
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

    def close(self) -> None:
        """Kill the workers. The next call of `grade` starts new ones."""
        for worker in self._workers:
            worker.stop()


def grade(problem: Problem | str, *, reply: str, reference: str | None = None, grader: Grader | None = None) -> Grade:
    """Return the verdict on one reply, with the answer found in it and, if the verdict is `unknown`, the reason.

    `problem` is a problem, or the name of a grader that compares the reply with `reference`. Each call starts a worker
    process and stops it; to grade many replies, open one `Grader` and hand it over.

    >>> from deepdistill import grade
    >>> found = grade("math", reference="3/4", reply="Half of 1.5 is 0.75, so the answer is 0.75.")
    >>> found.verdict, found.answer
    ('right', '0.75')
    >>> grade("number", reference="1500 m", reply="It is 1.4 km.").verdict
    'wrong'

    Raises:
        UsageError: `code` "settings-conflict" if a problem comes with another reference, or see `Grader.grade`.
        ModelError: see `Grader.grade`.
    """
    if isinstance(problem, str):
        problem = Problem(id="", question="", answer=reference, source="", grader=problem)
    elif reference is not None:
        hint = "leave it out, or name a grader instead of the problem"
        raise UsageError("a problem brings its own reference answer", hint, code="settings-conflict")
    with contextlib.nullcontext(grader) if grader else Grader(n_workers=1) as open_grader:
        return open_grader.grade(problem, reply)


def grade_answer(grader: GradesAnswers, problem: Problem, answer: Completion | Trace) -> Grade:
    """Return the verdict on an answer: unknown if it ended by itself and all of its text is in the reasoning."""
    if not answer.content.strip() and (answer.reasoning_content or "").strip() and answer.finish_reason == "stop":
        return Grade(None, "unknown", "none", None, IN_REASONING)
    return grader.grade(problem, answer.content)


def _answer(problem: Problem, content: str) -> str | None:
    """Return the final answer, in the same form as the reference."""
    gold = problem.answer
    numeric, multiline = gold is not None and is_number(gold), gold is None or "\n" in gold.strip()
    answer = final_answer(content, numeric=numeric, multiline=multiline)
    if answer and gold is not None and gold.rstrip().endswith(".") and not answer.endswith("."):
        answer += "."  # the reference is a sentence, and the answer lost its full stop with the content's
    return answer


def _shown(kind: Kind, problem: Problem, content: str) -> str | None:
    """Return the answer that the trace shows: the final answer, or the whole content if the grader reads that."""
    if kind.module == "json_value":
        return json_value.find(content, problem.answer or "")
    if kind.module == "label":
        with contextlib.suppress(CannotTell):
            return ", ".join(label.chosen(content, problem.metadata)) or None
        return None
    return content.strip() if kind.module in ("code.python", "json_schema") else _answer(problem, content)


class _Worker:
    """One worker process, started for its first request and replaced if it hangs or dies, for one thread at a time."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None
        self._replies: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._loaded: set[str] = set()
        self._lock = threading.Lock()

    def grade(self, grader: str, request: dict[str, Any], timeout_s: float) -> tuple[float | None, str]:
        """Return (score, ""), or (None, reason) if the grader cannot tell, hangs or dies."""
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
        """Kill the process, if there is one, whatever it is doing."""
        process = self.process
        if process is not None:
            process.kill()  # wakes the thread that waits for its reply
        with self._lock:
            self._stop()

    def _load(self, grader: str) -> None:
        kind, _ = kind_of(grader)
        reply = self._exchange({"load": grader}, _LOADING_S)
        if reply is None:
            raise ModelError(
                f"the grader {grader} does not start",
                "to see why, run python -m deepdistill.distill.graders.worker",
                code="grader-failed",
            )
        if error := reply["error"]:
            if reply["usage"]:
                hint = "docs/verification.md describes each grader"
                raise UsageError(f"cannot grade with {grader}: {error}", hint, code="bad-grader")
            if kind.module == "custom":
                hint = "run the command in the folder of its module"
                raise UsageError(f"cannot import the grader {grader}: {error}", hint, code="bad-grader")
            raise ModelError(f"cannot grade: {error}", "pip install 'deepdistill[teach]'", code="grader-failed")
        self._loaded.add(grader)

    def _exchange(self, message: dict[str, Any], timeout_s: float) -> dict[str, Any] | None:
        """Send a message and return the reply; if none comes in time, stop the worker and return None."""
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
        command = [sys.executable, "-P", "-m", f"{__package__}.worker"]  # -P: not a json.py of the working folder
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, encoding="utf-8"
        )
        # A queue for each process, so that a late reply of a killed one never answers the next one's request.
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
    """Put a worker's replies into a queue until it ends, then None."""
    assert process.stdout is not None
    with process.stdout as lines:
        try:
            for line in lines:
                replies.put(json.loads(line))
        except ValueError:
            process.kill()  # a dying worker wrote half a line
    replies.put(None)
