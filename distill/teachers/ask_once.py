"""Replies that a teacher or judge gives once and is never asked for again, in a JSONL file by the request's id.

Judging and expanding ask for text that is not a trace. An id is a hash of everything that decides the reply, so that an
interrupted run resumes with what it has, and a changed rubric, model or sampling asks anew. A request whose failure is
final is not stored: the next run asks it again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...localrun.core.generation import Completion, FinishReason, Message, Sampling
from ...localrun.core.record_log import RecordLog, read_records
from ...localrun.core.reporter import SILENT, Reporter
from ..recipe.gathering import CostRecipe
from ..records import Request
from .asking import Asked, ask_all
from .base import Teacher
from .budget import Budget


@dataclass(frozen=True)
class Ask:
    """A conversation to answer once. `ask_id` makes its `id`."""

    id: str
    messages: list[Message]


@dataclass(frozen=True)
class StoredReply:
    """A reply without its thinking."""

    id: str
    content: str
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    cost_usd: float | None = None


@dataclass(frozen=True)
class StoredReplies:
    """The replies by id, those of earlier runs among them. `stopped` says why some are missing."""

    by_id: dict[str, StoredReply]
    n_asked: int
    n_failed: int
    stopped: str | None


def ask_id(*parts: Any) -> str:
    """Return the hash that names a request, from everything that decides its reply."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def stored_replies(path: Path) -> dict[str, StoredReply]:
    """Return the replies of a file by id; none if there is no file.

    Raises:
        ArtifactError: `code` "line-broken": a line that is not the torn last one.
    """
    return {reply.id: reply for reply in read_records(path, StoredReply, missing_ok=True)}


def ask_once(
    asks: Sequence[Ask],
    path: Path,
    *,
    sampling: Sampling,
    open_teacher: Callable[[], Teacher],
    budget: Budget | None = None,
    report: Reporter = SILENT,
    stage: str = "replies",
) -> StoredReplies:
    """Return the replies to these requests, and ask only for those that the file lacks.

    The teacher is opened only if there is something to ask, and closed. `budget` counts what is spent and may end it.

    Raises:
        TeacherError: no request can succeed any more; every earlier reply is stored.
        ArtifactError: the file is broken or cannot be written.
    """
    stored = stored_replies(path)
    missing = {ask.id: ask for ask in asks if ask.id not in stored}
    budget, asked = budget or Budget(CostRecipe()), Asked(0, 0, None)
    if missing:
        asked = Asked(0, 0, budget.why_stop(0))
        if not asked.stopped:
            path.parent.mkdir(parents=True, exist_ok=True)
            with RecordLog(path, StoredReply) as file, open_teacher() as teacher:
                asking = _Missing(missing, stored, file, report, stage, n=len(missing))
                asked = ask_all(teacher, asking, sampling=sampling, budget=budget)
    by_id = {ask.id: stored[ask.id] for ask in asks if ask.id in stored}
    return StoredReplies(by_id, asked.n_asked, asked.n_failed, asked.stopped)


@dataclass
class _Missing:
    """The `n` requests whose replies a file lacks: an `Asking` that appends each reply to the file."""

    missing: dict[str, Ask]
    stored: dict[str, StoredReply]
    file: RecordLog[StoredReply]
    report: Reporter
    stage: str
    n: int
    n_ended: int = 0
    n_failed: int = 0

    def wanted(self) -> Iterator[Ask]:
        """Yield the requests that were not begun."""
        while self.missing:
            yield next(iter(self.missing.values()))

    def begin(self, item: Ask) -> Request:
        """Take a request out of those wanted."""
        del self.missing[item.id]
        return Request(item.messages, int(item.id[:7], 16))

    def end(self, item: Ask, completion: Completion, cost_usd: float | None) -> None:
        """Store a reply; a failure is only counted."""
        self.n_ended += 1
        if completion.finish_reason == "error":
            self.n_failed += 1
        else:
            reply = StoredReply(
                item.id,
                completion.content,
                completion.finish_reason,
                completion.prompt_tokens,
                completion.completion_tokens,
                cost_usd,
            )
            self.file.append(reply)
            self.stored[item.id] = reply
        note = f"{self.n_failed} failed" if self.n_failed else ""
        self.report.progress(self.stage, self.n_ended, total=self.n, note=note)
