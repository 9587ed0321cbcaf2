"""The process that grades: one JSON request a line on stdin, one JSON reply a line on stdout, all on the main thread.

`{"load": "math"}` imports a grader and answers `{"score": null, "error": null}`. `{"grader", "question", "gold",
"metadata", "answer"}` answers `{"score": 0.0 to 1.0, or null where the grader cannot tell, "error"}`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from functools import cache
from typing import Any


def main() -> None:
    """Answer requests until stdin ends."""
    # Graders may print: replies go out on a descriptor of their own.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    requests = os.fdopen(os.dup(0), encoding="utf-8")
    for line in requests:
        request = json.loads(line)
        score, error = None, None
        try:
            if "load" in request:
                _LOADERS[request["load"]]()
            elif request["grader"] == "math":
                score = grade_math(request["gold"], request["answer"])
            else:
                score = grade_gym(request)
        except Exception as problem:  # whatever a scorer stumbles over, it could not tell
            error = f"{type(problem).__name__}: {problem}"
        replies.write(json.dumps({"score": score, "error": error}) + "\n")
        replies.flush()


def grade_gym(request: dict[str, Any]) -> float:
    """Return the score that reasoning-gym's own scorer gives, fractions included.

    JSON makes lists of the metadata's tuples, and a few scorers compare with them: the better of both forms counts.
    """
    scorer = _gym_scorer(request["grader"].removeprefix("gym:"))
    entry = {"question": request["question"], "answer": request["gold"], "metadata": request["metadata"]}
    score = float(scorer(request["answer"], entry))
    if score == 1.0 or not any(isinstance(value, list) for value in request["metadata"].values()):
        return score
    try:
        tupled = {key: _tupled(value) for key, value in request["metadata"].items()}
        return max(score, float(scorer(request["answer"], entry | {"metadata": tupled})))
    except Exception:  # this scorer wants its lists
        return score


def grade_math(gold: str, answer: str) -> float | None:
    """Return 1.0 for the same mathematical value, 0.0 for another, None where the reference is no mathematics."""
    if _normal(gold) == _normal(answer):
        return 1.0
    if not _is_formula(gold):
        return None
    from math_verify import parse, verify

    gold_value = parse(f"${gold.strip().strip('$')}$")
    if not gold_value:
        return None
    # Only where it is no formula as a whole: of "x + 1" the plain reading would take the 1.
    value = parse(f"${answer.strip().strip('$')}$") or parse(answer)
    return 1.0 if verify(gold_value, value) else 0.0


def _tupled(value: Any) -> Any:
    return tuple(map(_tupled, value)) if isinstance(value, list) else value


def _normal(text: str) -> str:
    return " ".join(text.strip().strip("$.").casefold().split())


def _is_formula(text: str) -> bool:
    """Say whether a text is mathematics: math-verify would read "Paris" as the product a·i·P·r·s."""
    words = re.findall(r"(?<!\\)\b[A-Za-z]{2,}\b", re.sub(r"\\[a-zA-Z]+", " ", text))
    return not set(words) - {"pi", "sqrt", "sin", "cos", "tan", "log", "ln", "exp", "inf", "oo", "mod"}


def _load_math() -> None:
    import math_verify  # noqa: F401


def _load_gym() -> None:
    import reasoning_gym  # noqa: F401


@cache
def _gym_scorer(name: str) -> Callable[[str, dict[str, Any]], float]:
    from reasoning_gym.factory import get_score_answer_fn

    scorer: Callable[[str, dict[str, Any]], float] = get_score_answer_fn(name)
    return scorer


_LOADERS: dict[str, Callable[[], None]] = {"math": _load_math, "gym": _load_gym}


if __name__ == "__main__":
    main()
