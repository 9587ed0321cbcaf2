"""Verify answers: find the final one in what a model said, and have it graded in a process that can be killed.

The answer is taken from the content alone, never from the thinking, by one function for every caller. Graders run on
the main thread of one worker process (math-verify gives 0 without a word elsewhere, and both it and some of
reasoning-gym's scorers can run for ever on hostile input); a worker that hangs or dies is replaced, and what it was
asked is `unknown`.
"""

from __future__ import annotations

import contextlib
import json
import queue
import re
import subprocess
import sys
import threading
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self

from ..errors import ModelError
from .problems import Problem

Verdict = Literal["right", "wrong", "unknown"]
VerdictBy = Literal["grader", "vote", "judge", "none"]

_LOADING_S = 120.0  # importing sympy or reasoning-gym on a cold, busy machine
_NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?")
_MARKED = re.compile(r"\banswer\b[*_`\"'’s]*\s*(?:is|was|=|:)+[*_`\s]*:?\s*(?P<answer>[^\n]+)", re.IGNORECASE)
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)


@dataclass(frozen=True)
class Grade:
    """A verdict on one answer. `score` is the grader's own, in [0, 1]; `right` takes exactly 1.0."""

    answer: str | None
    verdict: Verdict
    verdict_by: VerdictBy
    score: float | None


def final_answer(content: str, *, numeric: bool, multiline: bool = False) -> str | None:
    r"""Return the answer that a content ends in, or None if there is none.

    Looked for in turn: the last `\boxed{}`, the last `<answer>`, the last "answer is X" or "Answer: X"; then the last
    number if a number is expected, all of the content if several lines are, else its last line that is not empty.
    """
    content = content.strip()
    for marked in (_boxed(content), _last(_TAGGED.findall(content)), _said(content)):
        if marked:
            return _number_in(marked) if numeric else _clean(marked)
    if not content:
        return None
    if numeric:
        numbers = _NUMBER.findall(_plain_signs(content))
        return _tidy_number(numbers[-1]) if numbers else None
    if multiline:
        return content
    return _clean(content.splitlines()[-1]) or None


def is_number(answer: str) -> bool:
    """Say whether an answer is one plain number, so that a number is what to look for."""
    return _NUMBER.fullmatch(_plain_signs(answer.strip())) is not None


class Grader:
    """Grades answers in one worker process, started when first needed. Close it, or use it as a context manager."""

    def __init__(self, timeout_s: float = 10.0) -> None:
        self.timeout_s = timeout_s
        self._worker: subprocess.Popen[str] | None = None
        self._replies: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._loaded: set[str] = set()
        self._lock = threading.Lock()

    def grade(self, problem: Problem, content: str) -> Grade:
        """Return the verdict on a content: `unknown` without a reference answer, or if grading hangs or fails.

        Raises:
            ModelError: the grader's package is not installed, or no worker can be started.
        """
        gold = problem.answer
        own_scorer = problem.grader.startswith("gym:")  # some of them judge an answer that has no reference
        numeric, multiline = gold is not None and is_number(gold), gold is None or "\n" in gold.strip()
        answer = final_answer(content, numeric=numeric, multiline=multiline)
        if gold is None and not own_scorer:
            return Grade(answer, "unknown", "none", None)
        if answer is None:
            return Grade(None, "wrong", "grader", 0.0)
        if gold is not None and gold.rstrip().endswith(".") and not answer.endswith("."):
            answer += "."  # a sentence was asked for, and its full stop read as the content's
        request = {"question": problem.question, "gold": gold, "metadata": problem.metadata, "answer": answer}
        with self._lock:
            score = self._ask(problem.grader, request)
        if score is None:
            return Grade(answer, "unknown", "none", None)
        return Grade(answer, "right" if score == 1.0 else "wrong", "grader", score)

    def close(self) -> None:
        """Kill the worker. The next grade starts another."""
        with self._lock:
            self._stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, grader: str, request: dict[str, Any]) -> float | None:
        """Return the worker's score, or None if it cannot tell, hangs or dies."""
        kind = grader.partition(":")[0]
        if self._worker is None or self._worker.poll() is not None:
            self._start()
        if kind not in self._loaded:
            reply = self._exchange({"load": kind}, _LOADING_S)
            if reply is None:
                raise ModelError(f"the {kind} grader does not start", "run python -m deepdistill.distill.grade_worker")
            if reply.get("error"):
                raise ModelError(f"cannot grade: {reply['error']}", "pip install 'deepdistill[teach]'")
            self._loaded.add(kind)
        reply = self._exchange({"grader": grader} | request, self.timeout_s)
        score = reply.get("score") if reply else None
        return float(score) if score is not None else None

    def _exchange(self, message: dict[str, Any], timeout_s: float) -> dict[str, Any] | None:
        """Send a line and wait for the reply to it; on silence or death stop the worker and return None."""
        worker = self._worker
        assert worker is not None
        assert worker.stdin is not None
        try:
            worker.stdin.write(json.dumps(message, default=str) + "\n")
            worker.stdin.flush()
            reply = self._replies.get(timeout=timeout_s)
        except (OSError, queue.Empty):
            reply = None
        if reply is None:
            self._stop()
        return reply

    def _start(self) -> None:
        self._stop()
        command = [sys.executable, "-m", f"{__package__}.grade_worker"]
        self._worker = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, encoding="utf-8"
        )
        # A queue for each worker: what a killed one still says must not answer the next one's question.
        self._replies = queue.Queue()
        threading.Thread(target=_read_replies, args=(self._worker, self._replies), daemon=True).start()

    def _stop(self) -> None:
        worker, self._worker = self._worker, None
        self._loaded.clear()
        if worker is None:
            return
        worker.kill()
        worker.wait()
        assert worker.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            worker.stdin.close()


def _read_replies(worker: subprocess.Popen[str], replies: queue.Queue[dict[str, Any] | None]) -> None:
    """Pass a worker's lines on until it ends; None says that it has."""
    assert worker.stdout is not None
    with worker.stdout as lines:
        try:
            for line in lines:
                replies.put(json.loads(line))
        except ValueError:
            worker.kill()  # half a line of a dying worker
    replies.put(None)


def _boxed(text: str) -> str | None:
    r"""Return what the last `\boxed{}` holds, braces inside it included."""
    start = max(text.rfind("\\boxed{"), text.rfind("\\fbox{"))
    if start < 0:
        return None
    begin = text.index("{", start) + 1
    depth = 1
    for i in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if not depth:
            return text[begin:i].strip()
    return None


def _said(text: str) -> str | None:
    """Return the X of the last "answer is X", up to the end of its sentence."""
    found = _last([match["answer"] for match in _MARKED.finditer(text)])
    return re.split(r"(?<=[^\s.])\.(?:\s|$)", found, maxsplit=1)[0] if found else None


def _last(found: list[str]) -> str | None:
    return found[-1].strip() or None if found else None


def _number_in(text: str) -> str | None:
    """Return the number that a marked answer states: of "12 + 30 = 42 legs" the 42; a formula stays whole."""
    text = _plain_signs(re.sub(r"\\text\s*\{[^}]*\}|\\[,;!% ]|\\left|\\right|\$", " ", text))
    result = re.split(r"[,;(]\s", text.rsplit("=", 1)[-1])[0]
    if re.search(r"\\[a-zA-Z]+|[\w)]\s*[-+*/^]\s*[\w(]", result):
        return _clean(result)
    numbers = _NUMBER.findall(result)
    return _tidy_number(numbers[0]) if numbers else _clean(text)


def _plain_signs(text: str) -> str:
    return text.replace("−", "-").replace("–", "-")


def _tidy_number(number: str) -> str:
    return number.replace(",", "").removeprefix("+")


def _clean(text: str) -> str:
    """Strip what decorates an answer: white space, Markdown marks, dollar signs, quotes, a final full stop."""
    text = text.strip()
    while True:
        stripped = text.strip('*_`"“”$ \t\n')
        stripped = stripped[:-1] if stripped.endswith(".") and not stripped.endswith("..") else stripped
        if stripped == text:
            return text
        text = stripped
