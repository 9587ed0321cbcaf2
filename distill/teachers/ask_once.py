"""What a teacher or judge was asked once and is never asked again: replies by the id of the request, in a JSONL file.

Judging and expanding ask for text that is no trace. An id is a hash of everything that decides the reply, so that a run
that was killed goes on with what it has, and a changed rubric, model or sampling asks anew. A request that failed for
good is not kept: the next run asks it again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...localrun.core.generation import FinishReason, Message, Sampling
from ...localrun.core.record_log import RecordLog, read_records
from ...localrun.core.reporter import Progress, no_progress
from ..records import Request
from .base import Teacher
from .budget import Budget, Limits


@dataclass(frozen=True)
class Ask:
    """A conversation to be answered once; `id` as `ask_id` makes it."""

    id: str
    messages: list[Message]


@dataclass(frozen=True)
class Reply:
    """What came back, without the thinking."""

    id: str
    content: str
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    cost_usd: float | None = None


@dataclass(frozen=True)
class Replies:
    """The replies to what was asked, by id, those of earlier runs among them. `stopped` says why some are missing."""

    by_id: dict[str, Reply]
    n_asked: int
    n_failed: int
    stopped: str | None


def ask_id(*parts: Any) -> str:
    """Return the hash that names a request: give everything that decides its reply."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def stored_replies(path: Path) -> dict[str, Reply]:
    """Return the replies of a file by id; no file: none.

    Raises:
        ArtifactError: a line other than a torn last one is broken.
    """
    return {reply.id: reply for reply in read_records(path, Reply, missing_ok=True)}


def ask_once(
    asks: Sequence[Ask],
    path: Path,
    sampling: Sampling,
    *,
    open_teacher: Callable[[], Teacher],
    budget: Budget | None = None,
    on_progress: Progress = no_progress,
    stage: str = "replies",
) -> Replies:
    """Return the replies to these requests, and ask only for those that the file lacks.

    The teacher is opened only if there is something to ask, and closed. `budget` counts what is spent and may end it.

    Raises:
        TeacherError: no request can succeed any more; what came before is kept.
        ArtifactError: the file is broken or cannot be written.
    """
    stored = stored_replies(path)
    wanted = list({ask.id: ask for ask in asks if ask.id not in stored}.values())
    budget = budget or Budget(Limits())
    stopped = budget.why_stop(0) if wanted else None
    n_asked = n_failed = n_drawn = 0

    def requests() -> Iterator[Request]:
        nonlocal n_drawn
        while n_drawn < len(wanted) and not budget.why_stop(n_drawn - n_asked, sampling.max_tokens):
            ask = wanted[n_drawn]
            n_drawn += 1
            yield Request(ask.messages, int(ask.id[:7], 16))

    if wanted and not stopped:
        path.parent.mkdir(parents=True, exist_ok=True)
        with RecordLog(path, Reply) as file, open_teacher() as teacher:
            while n_drawn < len(wanted) and not stopped:
                first = n_drawn
                for index, completion in teacher.generate(requests(), sampling):
                    n_asked += 1
                    cost = budget.record(completion)
                    if completion.finish_reason == "error":
                        n_failed += 1
                    else:
                        reply = Reply(
                            wanted[first + index].id,
                            completion.content,
                            completion.finish_reason,
                            completion.prompt_tokens,
                            completion.completion_tokens,
                            cost,
                        )
                        file.append(reply)
                        stored[reply.id] = reply
                    on_progress(stage, n_asked, len(wanted), f"{n_failed} failed" if n_failed else "")
                stopped = budget.why_stop(0) if n_drawn < len(wanted) else None
    return Replies({ask.id: stored[ask.id] for ask in asks if ask.id in stored}, n_asked, n_failed, stopped)
