"""The process that grades, on its main thread: JSON requests come on stdin, one a line, and replies go to stdout.

`{"load": "math"}` imports a grader; the reply is `{"error", "usage"}`: what failed, or null, and whether the grader's
argument is to blame. `{"problem", "content", "answer", "timeout_s"}` grades an answer; the reply is
`{"score", "reason"}`, with a score from 0.0 to 1.0, or null if the grader cannot tell.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from typing import Any

from .base import CannotTell, Submission, kind_of, load

_MEMORY = 8 << 30  # bytes of address space: sympy and reasoning-gym reserve far more than they touch


def main() -> None:
    """Answer requests until stdin ends."""
    # Graders may print, so replies have a descriptor of their own.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    requests = os.fdopen(os.dup(0), encoding="utf-8")
    with contextlib.suppress(ImportError):  # Windows
        from .code.sandbox import limit_worker

        limit_worker(_MEMORY)
    loaded: dict[str, Callable[[Submission], float | None]] = {}
    for line in requests:
        replies.write(json.dumps(_answer(json.loads(line), loaded)) + "\n")
        replies.flush()


def _answer(request: dict[str, Any], loaded: dict[str, Callable[[Submission], float | None]]) -> dict[str, Any]:
    try:
        if "load" in request:
            loaded[request["load"]] = load(request["load"])
            return {"error": None, "usage": False}
        _limit_cpu(request["timeout_s"])
        grader = request["problem"]["grader"]
        submission = Submission(
            argument=kind_of(grader)[1],
            content=request["content"],
            answer=request["answer"],
            problem=request["problem"],
            timeout_s=request["timeout_s"],
        )
        score = loaded[grader](submission)
        return {"score": score, "reason": ""}
    except CannotTell as error:
        return {"error": str(error), "usage": True} if "load" in request else {"score": None, "reason": str(error)}
    except Exception as error:  # whatever went wrong inside a scorer, it could not tell
        reason = f"{type(error).__name__}: {error}".rstrip(": ")
        return {"error": reason, "usage": False} if "load" in request else {"score": None, "reason": reason}


def _limit_cpu(seconds: float) -> None:
    with contextlib.suppress(ImportError):
        from .code.sandbox import limit_next

        limit_next(seconds)


if __name__ == "__main__":
    main()
