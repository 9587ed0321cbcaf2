"""Traces from other tools' files: chats, ShareGPT, ChatML text, and the columns of some twenty public data sets.

A row is recognised by its columns (the table in docs/traces.md), or the user names them. A file's own claims of
correctness are ignored: an imported trace is `unknown` until one of our graders has judged it, and it comes with its
problem for that.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from ...errors import ArtifactError, UsageError
from ...localrun.core.generation import FinishReason, Message
from ...localrun.core.text import listed
from ...localrun.families.thinking import split_finished
from ..problems.columns import (
    ROLES,
    TRACE_CONTENTS,
    TRACE_QUESTIONS,
    TRACE_REASONINGS,
    TRACE_WORKED,
    Unusable,
    as_text,
    read_turns,
    trace_answer,
)
from ..problems.files import Columns, read_rows
from ..problems.shape import grader_of
from ..problems.split import question_id
from ..records import NONE, Problem, TeacherInfo, Trace, Usage, question_in

_TABLES = (".jsonl", ".ndjson", ".parquet", ".csv")
_WRAPPERS = (("<|begin_of_solution|>", "<|end_of_solution|>"), ("<answer>", "</answer>"))  # OpenThoughts-114k, AM
_SWITCHES = {"on", "off", "true", "false", "yes", "no"}  # what a column named `reasoning` may hold instead of any
_CHATML = re.compile(r"<\|im_start\|>(\w+)\n(.*?)(?:<\|im_end\|>|\Z)", re.DOTALL)
_PARAMETERS = ("question", "reasoning", "content", "answer")


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

    `file.jsonl?question=COLUMN&reasoning=COLUMN&content=COLUMN&answer=COLUMN` names columns. The problem has the
    reference answer if the row has one, else the grader `none`. `teacher` is the name for rows that do not name their
    model. `on_skip` is called with (place, reason) for a row that is not taken. Importing a file twice gives the same
    ids. `max_tokens` and usage are 0 if the row does not say them.

    Raises:
        UsageError: `code` "no-such-parameter".
        ArtifactError: `code` "no-traces" if no row is recognised, or one of `read_rows`.
    """
    path, named = _with_columns(path)
    n_traces, columns = 0, ""
    for file in _files(path):
        for where, row in read_rows(file):
            try:
                if isinstance(row, ArtifactError):
                    raise Unusable(row.message)
                columns = ", ".join(map(str, row))
                row = {**row, **{name: row.get(column) for name, column in named.items()}}
                answers = _answers_in(row, named)
                for answer in answers:
                    for text in (answer.content, answer.reasoning, *(turn["content"] for turn in answer.messages)):
                        as_text(text)  # what cannot be stored
            except Unusable as error:
                if on_skip is not None:
                    on_skip(where, str(error))
                continue
            for index, answer in enumerate(answers):
                n_traces += 1
                yield _trace(row, answer, sample=index, teacher=teacher, file_name=file.name)
    if not n_traces:
        raise ArtifactError(
            f"no row of {path} is recognised as a trace" + (f"; its columns are {columns}" if columns else ""),
            f"name its columns: '{path}?question=COLUMN&content=COLUMN', or see docs/traces.md",
            code="no-traces",
        )


def _with_columns(path: Path) -> tuple[Path, dict[str, str]]:
    """Return a path without the names of columns that follow it, and these by what they hold."""
    if path.exists() or "?" not in path.name:
        return path, {}
    place, _, query = str(path).rpartition("?")
    named = dict(parse_qsl(query))
    if unknown := set(named) - set(_PARAMETERS):
        hint = f"traces take {listed(_PARAMETERS)}=COLUMN"
        raise UsageError(f"traces have no parameter {listed(sorted(unknown))}", hint, code="no-such-parameter")
    return Path(place), named


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


def _answers_in(row: Columns, named: Mapping[str, str]) -> list[_Answer]:
    """Return the answers in a row, read by the first layout that fits.

    Raises:
        Unusable: it has none, for the reason that the text says.
    """
    readers = (
        (_read_columns,) if "content" in named else (_read_generations, _read_chat, _read_preference, _read_columns)
    )
    for read in readers:
        answers = read(row)
        if answers is not None:
            whole = [answer for answer in answers if answer.content.strip() or (answer.reasoning or "").strip()]
            if whole:
                return whole
            raise Unusable("it has no answer")
    raise Unusable("it has no answer" if _prompt_of(row) else "it has no question")


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
    """Read `messages`, ShareGPT's `conversations` (from, value) or ChatML text: the last turn is the answer."""
    found = row.get("messages") or row.get("conversations")
    turns = read_turns(found)
    if turns is None and isinstance(text := row.get("text"), str) and "<|im_start|>" in text:
        turns = read_turns([{"role": role, "content": said.strip()} for role, said in _CHATML.findall(text)])
    if turns is None:
        if isinstance(found, list) and found:
            raise Unusable(_why_no_turns(found))
        return None
    if not any(turn["role"] == "user" for turn in turns):
        raise Unusable("its conversation has no turn of the user")
    if turns[-1]["role"] != "assistant":
        return None  # the answer may stand in a column of its own
    last = turns[-1]
    return [_Answer(_with_system(row, turns[:-1]), last["content"], last.get("reasoning_content"))]


def _why_no_turns(turns: list[Any]) -> str:
    roles = [str(turn.get("role") or turn.get("from")) for turn in turns if isinstance(turn, dict)]
    odd = next((role for role in roles if role not in ROLES), None)
    return f"its conversation has a turn of {odd!r}" if odd else "its conversation has a turn that is not text"


def _read_preference(row: Columns) -> list[_Answer] | None:
    """Read the chosen answer of a preference row: `prompt`, `chosen`, `rejected`; what was rejected is left out."""
    chosen = row.get("chosen")
    if not chosen:
        return None
    if turns := read_turns(chosen):
        prompt = turns[:-1] or _prompt_of(row)
        return [_Answer(prompt, turns[-1]["content"], turns[-1].get("reasoning_content"))] if prompt else None
    prompt = _prompt_of(row)
    return [_Answer(prompt, chosen)] if prompt and isinstance(chosen, str) else None


def _read_columns(row: Columns) -> list[_Answer] | None:
    """Read a column each for question, reasoning and answer, as Curator writes them (`deepseek_reasoning`, …)."""
    prompt, reasoning = _prompt_of(row), _reasoning_of(row)
    columns = TRACE_CONTENTS if reasoning is None else (*TRACE_CONTENTS, "solution", "answer")
    column = next((name for name in columns if isinstance(row.get(name), str) and row[name]), "")
    if not column and row.get("answer"):  # LIMO: the worked solution is the answer, and `answer` its reference
        column = next((name for name in TRACE_WORKED if isinstance(row.get(name), str) and row[name]), "")
    content = row.get(column)
    turns = read_turns(row.get("completion"))
    if turns and turns[-1]["role"] == "assistant":
        content, reasoning = turns[-1]["content"], turns[-1].get("reasoning_content", reasoning)
    return None if prompt is None or content is None else [_Answer(prompt, content, reasoning, column=column)]


def _reasoning_of(row: Columns) -> str | None:
    """Return the reasoning that a column holds; of s1K's list the first."""
    for name in TRACE_REASONINGS:
        value = row.get(name)
        value = value[0] if isinstance(value, list) and value else value
        if isinstance(value, str) and value and value.strip().lower() not in _SWITCHES:
            return value
    return None


def _prompt_of(row: Columns) -> list[Message] | None:
    """Return the conversation before the answer; None if the row has none."""
    for column in ("messages", "conversations", *TRACE_QUESTIONS):
        if turns := read_turns(row.get(column)):
            kept = turns[:-1] if turns[-1]["role"] == "assistant" else turns
            return _with_system(row, kept) if kept else None
        text = row.get(column)
        if isinstance(text, str) and text.strip():
            more = row.get("input") if column == "instruction" else None  # Alpaca
            return _with_system(row, [{"role": "user", "content": f"{text}\n\n{more}" if more else text}])
    return None


def _with_system(row: Columns, turns: list[Message]) -> list[Message]:
    system = row.get("system") or row.get("system_prompt")
    has_system = bool(turns) and turns[0]["role"] == "system"
    return [{"role": "system", "content": system}, *turns] if isinstance(system, str) and not has_system else turns


def _split(text: str) -> tuple[str | None, str, bool | None]:
    """Return (reasoning, content, whether the thinking was closed) of a text with the tags of any family."""
    reasoning, content, closed = split_finished(text)
    for opening, closing in _WRAPPERS:
        if content.strip().startswith(opening):
            content = content.strip().removeprefix(opening).removesuffix(closing)
    return (reasoning.strip() if reasoning is not None else None), content.strip(), closed


def _thinking_apart(message: Message) -> Message:
    """Return an earlier turn with its thinking, if any, moved to `reasoning_content`."""
    if message["role"] != "assistant" or "reasoning_content" in message:
        return message
    reasoning, content, _ = _split(message["content"])
    return {"role": "assistant", "content": content} | ({"reasoning_content": reasoning} if reasoning else {})


def _trace(row: Columns, answer: _Answer, *, sample: int, teacher: str, file_name: str) -> tuple[Problem, Trace]:
    reasoning, content, closed = _split(answer.content)
    if reasoning is None and answer.reasoning:
        reasoning, closed = answer.reasoning, True
    question = question_in(answer.messages)
    reference = trace_answer({name: value for name, value in row.items() if name != answer.column})
    source = str(row.get("source") or file_name)
    grader, _ = grader_of(reference) if reference else (NONE, {})
    problem = Problem(question_id(question), question, reference, source, grader)
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
        sampling={"max_tokens": 0},
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


def _item(row: Columns, column: str, index: int) -> Any:
    items = row.get(column)
    return items[index] if isinstance(items, list) and index < len(items) else None
