"""Traces as rows for other trainers: `messages` with the reasoning kept, as JSONL or Parquet.

The reasoning goes to `reasoning_content` of the last message, which chat templates of reasoning models render, or into
its content between `<think>` tags, for trainers that read nothing else. docs/traces.md says which trainer needs which.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from ...errors import ArtifactError
from ...localrun.core.atomic import replacing_file
from ...localrun.core.generation import Message
from ...localrun.families.thinking import CLOSE, OPEN
from ..records import Trace
from .store import TraceStore

Reasoning = Literal["field", "think"]
_ROWS_A_GROUP = 1000


def export_traces(
    path: Path,
    out: Path,
    *,
    to: Literal["messages", "parquet"] = "messages",
    reasoning: Reasoning = "field",
    include: Literal["accepted", "all"] = "accepted",
) -> int:
    """Write the traces of a file as training rows and return how many there are.

    `accepted` traces are finished, and right or favoured by a vote or a judge.

    Raises:
        ArtifactError: `code` "file-unreadable" or "line-broken" for the traces, "no-traces" if there is none to export,
            "write-failed" for `out`.
    """
    traces = (trace for trace in TraceStore.read(path) if include == "all" or _is_accepted(trace))
    rows = (_row(trace, reasoning) for trace in traces)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtifactError(
            f"cannot write {out}: {error.strerror or error}", "choose another place", code="write-failed"
        ) from error
    with replacing_file(out) as temporary:
        n_rows = _write_parquet(rows, temporary) if to == "parquet" else _write_lines(rows, temporary)
        if not n_rows:
            all_hint = "none is right or favoured by a vote or a judge: --all exports every trace"
            hint = all_hint if include == "accepted" else "the file is empty"
            raise ArtifactError(f"there is no trace to export in {path}", hint, code="no-traces")
    return n_rows


def _is_accepted(trace: Trace) -> bool:
    return trace.finish_reason == "stop" and (trace.verdict == "right" or trace.verdict_by in ("vote", "judge"))


def _row(trace: Trace, reasoning: Reasoning) -> dict[str, Any]:
    """Return a training row: `messages` up to the answer, all with the same keys for loaders, and their origin."""
    answer = {"role": "assistant", "content": trace.content, "reasoning_content": trace.reasoning_content or ""}
    return {
        "messages": [_message_of(message, reasoning) for message in [*trace.messages, answer]],
        "id": trace.id,
        "problem_id": trace.problem_id,
        "source": trace.source,
        "answer": trace.answer,
        "verdict": trace.verdict,
        "verdict_by": trace.verdict_by,
        "agreement": trace.agreement,
        "teacher": trace.teacher.name,
    }


def _message_of(message: Message, reasoning: Reasoning) -> Message:
    content, thought = _valid(message["content"]), _valid(message.get("reasoning_content", ""))
    if reasoning == "field":
        return {"role": message["role"], "content": content, "reasoning_content": thought}
    return {
        "role": message["role"],
        "content": f"{OPEN}\n{thought}\n{CLOSE}\n\n{content}" if thought else content,
    }


def _valid(text: str) -> str:
    """Return a text that every reader accepts: half a surrogate pair becomes a question mark."""
    return text.encode("utf-8", "replace").decode()


def _write_lines(rows: Iterable[dict[str, Any]], path: Path) -> int:
    with path.open("w", encoding="utf-8") as lines:
        return sum(lines.write(json.dumps(row, ensure_ascii=False) + "\n") > 0 for row in rows)


def _write_parquet(rows: Iterator[dict[str, Any]], path: Path) -> int:
    import pyarrow as pa
    import pyarrow.parquet

    first = next(rows, None)
    if first is None:
        return 0
    message = pa.struct([(name, pa.string()) for name in first["messages"][0]])
    columns = {name: pa.float64() if name == "agreement" else pa.string() for name in first}
    schema = pa.schema(columns | {"messages": pa.list_(message)})
    n_rows, group = 0, [first, *islice(rows, _ROWS_A_GROUP - 1)]
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        while group:
            writer.write_table(pa.Table.from_pylist(group, schema=schema))
            n_rows += len(group)
            group = list(islice(rows, _ROWS_A_GROUP))
    return n_rows
