"""Traces, and the file that keeps them: a JSON line each, appended in one write, valid after `kill -9` at any byte.

A process that dies while it writes leaves at most a last line without its newline; opening the store cuts that line
off and says so. A broken line anywhere else is no accident of ours: it is named, and nothing is overwritten.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Self, get_args

from ..errors import ArtifactError
from ..localrun.generation import Completion, FinishReason, Message, Sampling
from .grade import Grade, Verdict, VerdictBy
from .problems import Problem
from .teachers.base import TeacherInfo


@dataclass(frozen=True)
class Usage:
    """Counts in tokens; `reasoning` is a part of `completion`."""

    prompt: int
    completion: int
    reasoning: int


@dataclass(frozen=True)
class Trace:
    """What a teacher said to one problem, and whether it was right. Reasoning and content stand apart, without tags."""

    id: str
    problem_id: str
    messages: list[Message]
    reasoning_content: str | None
    content: str
    answer: str | None
    verdict: Verdict
    verdict_by: VerdictBy
    finish_reason: FinishReason
    usage: Usage
    teacher: TeacherInfo
    sampling: Sampling
    seconds: float
    cost_usd: float | None = None

    def to_json(self) -> str:
        """Return the trace as one line without its newline."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def make(
        cls,
        problem: Problem,
        completion: Completion,
        grade: Grade,
        info: TeacherInfo,
        teacher: str,
        sampling: Sampling,
        sample_index: int = 0,
        *,
        messages: Sequence[Message] | None = None,
        cost_usd: float | None = None,
    ) -> Trace:
        """Put together what was asked (by default the question alone), what came back and the verdict."""
        return cls(
            id=trace_id(problem.id, teacher, sampling, sample_index),
            problem_id=problem.id,
            messages=list(messages) if messages else [{"role": "user", "content": problem.question}],
            reasoning_content=completion.reasoning_content,
            content=completion.content,
            answer=grade.answer,
            verdict=grade.verdict,
            verdict_by=grade.verdict_by,
            finish_reason=completion.finish_reason,
            usage=Usage(completion.prompt_tokens, completion.completion_tokens, completion.reasoning_tokens),
            teacher=info,
            sampling=sampling,
            seconds=completion.seconds,
            cost_usd=cost_usd,
        )

    @classmethod
    def from_json(cls, line: str | bytes) -> Trace:
        """Return the trace of a line; fields that a newer version may have added are left out.

        Raises:
            ValueError: the line is no JSON, or no trace.
        """
        record = json.loads(line)
        if not isinstance(record, dict):
            raise ValueError("not a JSON object")
        record = {field.name: record[field.name] for field in fields(cls) if field.name in record}
        try:
            for name, kind in (("usage", Usage), ("teacher", TeacherInfo), ("sampling", Sampling)):
                record[name] = kind(**record[name])
            trace = cls(**record)
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a trace: {error}") from error
        if trace.verdict not in get_args(Verdict) or not isinstance(trace.content, str):
            raise ValueError(f"not a trace: verdict {trace.verdict!r}, content {type(trace.content).__name__}")
        return trace


def trace_id(problem_id: str, teacher: str, sampling: Sampling, sample_index: int) -> str:
    """Return the hash that names one sample of one problem: the same request has the same id in every run.

    `teacher` is the string that the user gave, so that a resumed run knows what it has before it opens the teacher.
    """
    key = [problem_id, teacher, asdict(sampling), sample_index]
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]


def sample_seed(trace_id: str) -> int:
    """Return the seed of a sample: a resumed run samples what the interrupted one would have."""
    return int(trace_id[:7], 16)


class TraceStore:
    """An append-only file of traces. One writer at a time; close it, or use it as a context manager.

    A killed process loses nothing that `append` returned from. Against a loss of power the file is synced to the disk
    every `sync_every_s` seconds and on closing. `cut_bytes` says how much of a torn last line was cut off on opening.
    """

    def __init__(self, path: Path, *, sync_every_s: float = 5.0) -> None:
        """Open or create the file.

        Raises:
            ArtifactError: it cannot be opened, or a line other than a torn last one is broken.
        """
        self.path, self.sync_every_s = path, sync_every_s
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._ids, good = _scan(path) if path.exists() else (set(), 0)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o644)
            self._size = os.fstat(self._file).st_size
            self.cut_bytes = self._size - good
            if self.cut_bytes:
                self._truncate(good)
        except OSError as error:
            raise ArtifactError(f"cannot open {path}: {error.strerror or error}") from error
        self._synced, self._is_dirty = time.monotonic(), False

    def append(self, trace: Trace) -> None:
        """Add a trace, in the file before this returns; one whose id is already there is left out.

        Raises:
            ArtifactError: the disk is full or the file cannot be written; what was there before is still valid.
        """
        if trace.id in self._ids:
            return
        line = (trace.to_json() + "\n").encode()
        self._is_dirty = True
        try:
            written = os.write(self._file, line)
            while written < len(line):  # a nearly full disk takes a part and then refuses the rest
                written += os.write(self._file, line[written:])
            if time.monotonic() - self._synced > self.sync_every_s:
                self._sync()
        except OSError as error:
            self._truncate(self._size)
            raise ArtifactError(
                f"cannot write to {self.path}: {error.strerror or error}",
                "make room and run the same command again: it goes on after the last whole trace",
            ) from error
        self._size += len(line)
        self._ids.add(trace.id)

    def has(self, trace_id: str) -> bool:
        """Say whether a trace of this id is stored."""
        return trace_id in self._ids

    def __len__(self) -> int:
        return len(self._ids)

    def __iter__(self) -> Iterator[Trace]:
        """Yield the traces stored so far, in order, read from the file."""
        return self.read(self.path)

    @staticmethod
    def read(path: Path) -> Iterator[Trace]:
        """Yield the distinct traces of a file without touching it; a torn last line is left out.

        Raises:
            ArtifactError: the file is missing, or a line other than a torn last one is broken.
        """
        seen: set[str] = set()
        for trace, _ in _lines(path):
            if trace.id not in seen:
                seen.add(trace.id)
                yield trace

    def close(self) -> None:
        """Sync and close. More than one call does no harm."""
        if self._file >= 0:
            try:
                self._sync()
            finally:
                os.close(self._file)
                self._file = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _sync(self) -> None:
        if self._is_dirty:
            os.fsync(self._file)
        self._synced, self._is_dirty = time.monotonic(), False

    def _truncate(self, size: int) -> None:
        os.ftruncate(self._file, size)
        self._size = size


def _scan(path: Path) -> tuple[set[str], int]:
    """Return the ids in a file and where its last whole line ends, in bytes."""
    ids: set[str] = set()
    good = 0
    for trace, end in _lines(path):
        ids.add(trace.id)
        good = end
    return ids, good


def _lines(path: Path) -> Iterator[tuple[Trace, int]]:
    """Yield (trace, where its line ends) of each whole line."""
    try:
        with path.open("rb") as lines:
            end = 0
            for number, line in enumerate(lines, 1):
                if not line.endswith(b"\n"):
                    return
                end += len(line)
                try:
                    trace = Trace.from_json(line)
                except ValueError as error:
                    raise ArtifactError(
                        f"{path}:{number} is broken: {error}",
                        "nothing was changed; mend or delete that line, or give another --out",
                    ) from error
                yield trace, end
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror or error}", "is it the traces file?") from error
