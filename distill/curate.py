"""Which traces train: verified, complete, from the training bucket, one a problem; and how many each filter took."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .split import bucket_of
from .traces import Trace

FILTERS = {
    "held_out": "the question is not in the training bucket of the split",
    "wrong": "the grader says the answer is wrong",
    "unknown": "no grader could judge the answer",
    "cut_off": "the teacher reached its limit before it ended",
    "no_reasoning": "the trace holds no reasoning to learn from",
    "duplicate": "another trace of the same problem was kept",
}


def curate(traces: Iterable[Trace]) -> tuple[list[Trace], dict[str, Any]]:
    """Return the traces to train on and the record for curation.json.

    Of several right traces of one problem the shortest is kept: small students learn short chains best.
    """
    kept: dict[str, Trace] = {}
    dropped = dict.fromkeys(FILTERS, 0)
    total = 0
    for trace in traces:
        total += 1
        reason = _reason_to_drop(trace)
        if reason is None and trace.problem_id in kept:
            reason = "duplicate"
            if len(trace.reasoning_content or "") < len(kept[trace.problem_id].reasoning_content or ""):
                kept[trace.problem_id] = trace
        elif reason is None:
            kept[trace.problem_id] = trace
        if reason:
            dropped[reason] += 1
    record = {"traces": total, "kept": len(kept), "dropped": dropped, "why": FILTERS}
    return list(kept.values()), record


def _reason_to_drop(trace: Trace) -> str | None:
    question = next((m["content"] for m in trace.messages if m["role"] == "user"), "")
    if bucket_of(question) != "train":
        return "held_out"
    if trace.verdict != "right":
        return trace.verdict
    if trace.finish_reason != "stop":
        return "cut_off"
    return None if (trace.reasoning_content or "").strip() else "no_reasoning"
