"""The process that grades: one JSON request a line on stdin, one JSON reply a line on stdout, all on the main thread.

`{"load": "math"}` imports a grader. `{"problem", "content", "answer", "timeout_s"}` has an answer graded. The reply is
`{"score": 0.0 to 1.0, or null where the grader cannot tell, "reason"}`, to a load `{"error", "usage"}`: what failed, or
null, and whether it is the grader's name or argument that is off.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from typing import Any

from .base import CannotTell, Submission, kind_of, load

_MEMORY = 8 << 30  # bytes of address space, of which sympy and reasoning-gym reserve more than they touch


def main() -> None:
    """Answer requests until stdin ends."""
    # Graders may print: replies go out on a descriptor of their own.
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
    except Exception as error:  # whatever a scorer stumbles over, it could not tell
        reason = f"{type(error).__name__}: {error}".rstrip(": ")
        return {"error": reason, "usage": False} if "load" in request else {"score": None, "reason": reason}


def _limit_cpu(seconds: float) -> None:
    with contextlib.suppress(ImportError):
        from .code.sandbox import limit_next

        limit_next(seconds)


if __name__ == "__main__":
    main()
