"""Traces from other tools' files: chats, ShareGPT, OpenR1-Math, OpenThoughts, Curator, distilabel.

A row is recognised by its columns (the table in docs/traces.md). A file's own claims of correctness are ignored: an
imported trace is `unknown` until one of our graders has judged it, and it comes with its problem for that.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import ArtifactError
from ...localrun.core.generation import FinishReason, Message, Sampling
from ...localrun.families.thinking import THINK, Tags, split_thinking
from ..problems.columns import TRACE_CONTENTS, TRACE_QUESTIONS, TRACE_REASONINGS, trace_answer
from ..problems.files import Columns, read_rows
from ..problems.split import question_id
from ..records import NONE, Problem, TeacherInfo, Trace, Usage, question_in

_TABLES = (".jsonl", ".ndjson", ".parquet", ".csv")
_THOUGHT = Tags("<|begin_of_thought|>", "<|end_of_thought|>")  # Sky-T1, Bespoke-Stratos, OpenThoughts-114k
_SOLUTION = Tags("<|begin_of_solution|>", "<|end_of_solution|>")
_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
}


@dataclass(frozen=True)
class _Answer:
    """One answer in a row, and the conversation before it."""

    messages: list[Message]
    content: str
    reasoning: str | None = None
    finish_reason: FinishReason | None = None
    usage: Usage = field(default_factory=lambda: Usage(0, 0, 0))
    column: str = ""
    """The content's column, if it might also hold a reference: an answer must not be graded against itself."""


def import_traces(
    path: Path, *, teacher: str = "unknown", on_skip: Callable[[str, str], None] | None = None
) -> Iterator[tuple[Problem, Trace]]:
    """Yield each trace of a .jsonl, .parquet or .csv file, or of a folder of them, with the problem that it answers.

    The problem has the reference answer if the row has one, else the grader `none`. `teacher` is the name for rows that
    do not name their model. `on_skip` is called with (place, reason) for a row without an answer. Importing a file
    twice gives the same ids. `max_tokens` and usage are 0 if the row does not say them.

    Raises:
        ArtifactError: `code` "no-traces" if no row is recognised, or one of `read_rows`.
    """
    n_traces, columns = 0, ""
    for file in _files(path):
        for where, row in read_rows(file):
            if isinstance(row, ArtifactError):
                if on_skip is not None:
                    on_skip(where, row.message)
                continue
            columns = ", ".join(map(str, row))
            answers = _answers_in(row)
            if not answers and on_skip is not None:
                on_skip(where, "it has no answer")
            for index, answer in enumerate(answers):
                n_traces += 1
                yield _trace(row, answer, sample=index, teacher=teacher, file_name=file.name)
    if not n_traces:
        raise ArtifactError(
            f"no row of {path} is recognised as a trace" + (f"; its columns are {columns}" if columns else ""),
            "a row needs messages, conversations, or a question with a generation (docs/traces.md)",
            code="no-traces",
        )


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise ArtifactError(
            f"there are no traces at {path}",
            "name a traces.jsonl, or another tool's file or folder (docs/traces.md)",
            code="no-such-file",
        )
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in _TABLES)
    if not files:
        raise ArtifactError(f"{path} has no {', '.join(_TABLES)} file", "name another folder", code="no-traces")
    return files


def _answers_in(row: Columns) -> list[_Answer]:
    """Return the answers in a row, read by the first layout that fits."""
    for read in (_read_generations, _read_chat, _read_columns):
        answers = read(row)
        if answers is not None:
            return [answer for answer in answers if answer.content.strip() or (answer.reasoning or "").strip()]
    return []


def _read_generations(row: Columns) -> list[_Answer] | None:
    """Read OpenR1-Math (`problem`, `generations`) and distilabel (`instruction` or `messages`, `generation`)."""
    texts = row.get("generations", row.get("generation"))
    prompt = _prompt_of(row)
    if texts is None or prompt is None:
        return None
    texts = [texts] if isinstance(texts, str) else list(texts)
    answers = []
    for index, text in enumerate(texts):
        if text is None:  # distilabel's mark for a failed call
            continue
        reason: FinishReason | None = None
        if (named := _item(row, "finish_reasons", index)) is not None:
            reason = "length" if named == "length" else "stop"
        elif (complete := _item(row, "is_reasoning_complete", index)) is not None:
            reason = "stop" if complete else "length"
        usage = _usage(row) if len(texts) == 1 else Usage(0, 0, 0)
        answers.append(_Answer(prompt, text, finish_reason=reason, usage=usage))
    return answers


def _read_chat(row: Columns) -> list[_Answer] | None:
    """Read `messages` (role, content) and ShareGPT's `conversations` (from, value): the last turn is the answer."""
    turns = _turns(row.get("messages") or row.get("conversations"))
    if turns is None:
        return None
    if turns[-1]["role"] != "assistant" or not any(turn["role"] == "user" for turn in turns):
        return []
    last = turns[-1]
    return [_Answer(_with_system(row, turns[:-1]), last["content"], last.get("reasoning_content"))]


def _read_columns(row: Columns) -> list[_Answer] | None:
    """Read a column each for question, reasoning and answer, as Curator writes them (`deepseek_reasoning`, …)."""
    prompt, reasoning = _prompt_of(row), _first(row, TRACE_REASONINGS)
    columns = TRACE_CONTENTS if reasoning is None else (*TRACE_CONTENTS, "solution", "answer")
    column = next((name for name in columns if isinstance(row.get(name), str) and row[name]), "")
    content = row.get(column)
    turns = _turns(row.get("completion"))
    if turns and turns[-1]["role"] == "assistant":
        content, reasoning = turns[-1]["content"], turns[-1].get("reasoning_content", reasoning)
    return None if prompt is None or content is None else [_Answer(prompt, content, reasoning, column=column)]


def _prompt_of(row: Columns) -> list[Message] | None:
    """Return the conversation before the answer; None if the row has none."""
    for column in ("messages", *TRACE_QUESTIONS):
        turns = _turns(row.get(column))
        if turns:
            kept = turns[:-1] if turns[-1]["role"] == "assistant" else turns
            return _with_system(row, kept) if kept else None
        text = row.get(column)
        if isinstance(text, str) and text.strip():
            more = row.get("input") if column == "instruction" else None  # Alpaca
            return _with_system(row, [{"role": "user", "content": f"{text}\n\n{more}" if more else text}])
    return None


def _turns(turns: Any) -> list[Message] | None:
    """Return a list of turns under our names; None if it is not such a list or has an unknown role."""
    if not isinstance(turns, list) or not turns:
        return None
    messages: list[Message] = []
    for turn in turns:
        role = _ROLES.get(turn.get("role") or turn.get("from") or "") if isinstance(turn, dict) else None
        text = turn.get("content", turn.get("value")) if role else None
        if role is None or not isinstance(text, str):
            return None
        thought = _first(turn, TRACE_REASONINGS) if role == "assistant" else None
        messages.append({"role": role, "content": text} | ({"reasoning_content": thought} if thought else {}))
    return messages


def _with_system(row: Columns, turns: list[Message]) -> list[Message]:
    system = row.get("system") or row.get("system_prompt")
    has_system = bool(turns) and turns[0]["role"] == "system"
    return [{"role": "system", "content": system}, *turns] if isinstance(system, str) and not has_system else turns


def _split(text: str) -> tuple[str | None, str, bool | None]:
    """Return (reasoning, content, whether the thinking was closed) of a text with either kind of tags."""
    tags = _THOUGHT if _THOUGHT.open in text or _THOUGHT.close in text else THINK
    starts_inside = tags.close in text and not text.lstrip().startswith(tags.open)  # the template had opened it
    reasoning, content, closed = split_thinking(text, starts_inside, tags)
    content = content.strip().removeprefix(_SOLUTION.open).removesuffix(_SOLUTION.close)
    return (reasoning.strip() if reasoning is not None else None), content.strip(), closed


def _thinking_apart(message: Message) -> Message:
    """Return an earlier turn with its thinking, if any, moved to `reasoning_content`."""
    if message["role"] != "assistant" or "reasoning_content" in message:
        return message
    reasoning, content, _ = _split(message["content"])
    return {"role": "assistant", "content": content} | ({"reasoning_content": reasoning} if reasoning else {})


def _trace(row: Columns, answer: _Answer, *, sample: int, teacher: str, file_name: str) -> tuple[Problem, Trace]:
    reasoning, content, closed = (
        (answer.reasoning, answer.content, True) if answer.reasoning else _split(answer.content)
    )
    question = question_in(answer.messages)
    reference = trace_answer({name: value for name, value in row.items() if name != answer.column})
    source = str(row.get("source") or file_name)
    problem = Problem(question_id(question), question, reference, source, "math" if reference else NONE)
    info = TeacherInfo(str(row.get("model_name") or row.get("model") or teacher), "imported")
    key = json.dumps(["import", problem.id, info.name, reasoning, content])
    trace = Trace(
        id=hashlib.sha256(key.encode()).hexdigest()[:32],
        problem_id=problem.id,
        messages=[_thinking_apart(message) for message in answer.messages],
        reasoning_content=reasoning,
        content=content,
        answer=None,
        verdict="unknown",
        verdict_by="none",
        finish_reason=answer.finish_reason or ("length" if closed is False else "stop"),
        usage=answer.usage,
        teacher=info,
        sampling=Sampling(max_tokens=0),
        seconds=0.0,
        source=source,
        sample=sample,
    )
    return problem, trace


def _usage(row: Columns) -> Usage:
    """Return distilabel's token counts, if it counted."""
    for name, counted in (row.get("distilabel_metadata") or {}).items():
        if name.startswith("statistics_") and isinstance(counted, dict):
            counts = [counted.get("input_tokens"), counted.get("output_tokens")]
            prompt, completion = (count[0] if isinstance(count, list) and count else count for count in counts)
            return Usage(int(prompt or 0), int(completion or 0), 0)
    return Usage(0, 0, 0)


def _first(row: Columns, columns: tuple[str, ...]) -> str | None:
    return next((row[name] for name in columns if isinstance(row.get(name), str) and row[name]), None)


def _item(row: Columns, column: str, index: int) -> Any:
    items = row.get(column)
    return items[index] if isinstance(items, list) and index < len(items) else None
