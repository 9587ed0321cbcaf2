"""Traces that others made, read from their files: chats, ShareGPT, OpenR1-Math, OpenThoughts, Curator, distilabel.

A row is recognised by its columns (the table in docs/traces.md). What a file claims of its own correctness goes
nowhere: an imported trace is `unknown` until a grader here has looked at it, and comes with its problem for that.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import ArtifactError
from ...localrun.core.generation import FinishReason, Message, Sampling
from ...localrun.families.thinking import THINK, Tags, split_thinking
from ..graders.answer import final_answer
from ..problems.files import read_rows
from ..problems.split import question_hash
from ..records import Problem, TeacherInfo, Trace, Usage

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
_QUESTIONS = ("problem", "question", "instruction", "prompt", "query", "input")
_REASONINGS = ("reasoning_content", "deepseek_reasoning", "reasoning", "reasoning_trace", "thinking")
_CONTENTS = ("deepseek_solution", "generation", "response", "completion", "content", "output")
_ANSWERS = ("answer", "final_answer", "ground_truth", "ground_truth_solution", "expected_answer")


@dataclass(frozen=True)
class _Said:
    """One answer of a row, and what was asked."""

    messages: list[Message]
    content: str
    reasoning: str | None = None
    finish_reason: FinishReason | None = None
    usage: Usage = field(default_factory=lambda: Usage(0, 0, 0))
    column: str = ""
    """Which one the content stands in, where it could be one of references too: what is graded is no reference."""


def import_traces(
    path: Path, *, teacher: str = "unknown", on_skip: Callable[[str, str], None] | None = None
) -> Iterator[tuple[Problem, Trace]]:
    """Yield each trace of a .jsonl, .parquet or .csv file, or of a folder of them, with the problem that it answers.

    The problem holds the reference answer, if the row has one, and else the grader `none`. `teacher` names who answered
    where the row does not. `on_skip` is called with (where, why) for a row without an answer. Importing a file twice
    gives the same ids. Sampling and counts that a row does not hold are 0 (`max_tokens` and usage).

    Raises:
        ArtifactError: the file is missing or broken, or not one row is recognised.
    """
    n_traces, columns = 0, ""
    for file in _files(path):
        for where, row in read_rows(file):
            columns = ", ".join(map(str, row))
            said = _read(row)
            if not said and on_skip is not None:
                on_skip(where, "no answer in it")
            for index, one in enumerate(said):
                n_traces += 1
                yield _make(row, one, index, teacher, file.name)
    if not n_traces:
        raise ArtifactError(
            f"no trace is recognised in {path}" + (f"; its columns are {columns}" if columns else ""),
            "a row needs messages, conversations, or a question with a generation (docs/traces.md)",
        )


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise ArtifactError(
            f"no traces at {path}", "give a traces.jsonl, or a file or folder of another tool's (docs/traces.md)"
        )
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in _TABLES)
    if not files:
        raise ArtifactError(f"{path} holds no {', '.join(_TABLES)} file")
    return files


def _read(row: Mapping[str, Any]) -> list[_Said]:
    """Return the answers of a row, by the first layout that fits."""
    for layout in (_generations, _chat, _columns):
        said = layout(row)
        if said is not None:
            return [one for one in said if one.content.strip() or (one.reasoning or "").strip()]
    return []


def _generations(row: Mapping[str, Any]) -> list[_Said] | None:
    """OpenR1-Math (`problem`, `generations`) and distilabel (`instruction` or `messages`, `generation`)."""
    texts = row.get("generations", row.get("generation"))
    asked = _asked(row)
    if texts is None or asked is None:
        return None
    texts = [texts] if isinstance(texts, str) else list(texts)
    said = []
    for index, text in enumerate(texts):
        if text is None:  # distilabel's mark of a call that failed
            continue
        reason: FinishReason | None = None
        if (named := _item(row, "finish_reasons", index)) is not None:
            reason = "length" if named == "length" else "stop"
        elif (complete := _item(row, "is_reasoning_complete", index)) is not None:
            reason = "stop" if complete else "length"
        said.append(_Said(asked, text, finish_reason=reason, usage=_usage(row) if len(texts) == 1 else Usage(0, 0, 0)))
    return said


def _chat(row: Mapping[str, Any]) -> list[_Said] | None:
    """`messages` (role, content) and ShareGPT's `conversations` (from, value): the last turn answers the others."""
    turns = _turns(row.get("messages") or row.get("conversations"))
    if turns is None:
        return None
    if turns[-1]["role"] != "assistant" or not any(turn["role"] == "user" for turn in turns):
        return []
    last = turns[-1]
    return [_Said(_with_system(row, turns[:-1]), last["content"], last.get("reasoning_content"))]


def _columns(row: Mapping[str, Any]) -> list[_Said] | None:
    """A question, a reasoning and an answer, each a column, as parsed by Curator: `deepseek_reasoning` and others."""
    asked, reasoning = _asked(row), _first(row, _REASONINGS)
    columns = _CONTENTS if reasoning is None else (*_CONTENTS, "solution", "answer")
    column = next((name for name in columns if isinstance(row.get(name), str) and row[name]), "")
    content = row.get(column)
    turns = _turns(row.get("completion"))
    if turns and turns[-1]["role"] == "assistant":
        content, reasoning = turns[-1]["content"], turns[-1].get("reasoning_content", reasoning)
    return None if asked is None or content is None else [_Said(asked, content, reasoning, column=column)]


def _asked(row: Mapping[str, Any]) -> list[Message] | None:
    """Return the conversation up to the answer."""
    for column in ("messages", *_QUESTIONS):
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
    """Return a list of turns with our names; None if it is no such list or holds another role."""
    if not isinstance(turns, list) or not turns:
        return None
    messages: list[Message] = []
    for turn in turns:
        role = _ROLES.get(turn.get("role") or turn.get("from") or "") if isinstance(turn, dict) else None
        text = turn.get("content", turn.get("value")) if role else None
        if role is None or not isinstance(text, str):
            return None
        thought = _first(turn, _REASONINGS) if role == "assistant" else None
        messages.append({"role": role, "content": text} | ({"reasoning_content": thought} if thought else {}))
    return messages


def _with_system(row: Mapping[str, Any], turns: list[Message]) -> list[Message]:
    system = row.get("system") or row.get("system_prompt")
    has_own = bool(turns) and turns[0]["role"] == "system"
    return [{"role": "system", "content": system}, *turns] if isinstance(system, str) and not has_own else turns


def _split(text: str) -> tuple[str | None, str, bool | None]:
    """Return (reasoning, content, closed) of a text with either kind of tags."""
    tags = _THOUGHT if _THOUGHT.open in text or _THOUGHT.close in text else THINK
    starts_inside = tags.close in text and not text.lstrip().startswith(tags.open)  # the template had opened it
    reasoning, content, closed = split_thinking(text, starts_inside, tags)
    content = content.strip().removeprefix(_SOLUTION.open).removesuffix(_SOLUTION.close)
    return (reasoning.strip() if reasoning is not None else None), content.strip(), closed


def _thinking_apart(message: Message) -> Message:
    """Return an earlier turn with its thinking, if it holds some, in `reasoning_content`."""
    if message["role"] != "assistant" or "reasoning_content" in message:
        return message
    reasoning, content, _ = _split(message["content"])
    return {"role": "assistant", "content": content} | ({"reasoning_content": reasoning} if reasoning else {})


def _make(row: Mapping[str, Any], said: _Said, sample: int, teacher: str, name: str) -> tuple[Problem, Trace]:
    reasoning, content, closed = (said.reasoning, said.content, True) if said.reasoning else _split(said.content)
    question = next((m["content"] for m in reversed(said.messages) if m["role"] == "user"), "")
    answer = _gold({name: value for name, value in row.items() if name != said.column})
    source = str(row.get("source") or name)
    problem = Problem(question_hash(question)[:16], question, answer, source, "math" if answer else "none")
    info = TeacherInfo(str(row.get("model_name") or row.get("model") or teacher), "imported")
    key = json.dumps(["import", problem.id, info.name, reasoning, content])
    trace = Trace(
        id=hashlib.sha256(key.encode()).hexdigest()[:32],
        problem_id=problem.id,
        messages=[_thinking_apart(message) for message in said.messages],
        reasoning_content=reasoning,
        content=content,
        answer=None,
        verdict="unknown",
        verdict_by="none",
        finish_reason=said.finish_reason or ("length" if closed is False else "stop"),
        usage=said.usage,
        teacher=info,
        sampling=Sampling(max_tokens=0),
        seconds=0.0,
        source=source,
        sample=sample,
    )
    return problem, trace


def _gold(row: Mapping[str, Any]) -> str | None:
    """Return the reference answer: of a whole worked solution what it puts in a box, else nothing."""
    for column in _ANSWERS:
        text = row.get(column)
        if not isinstance(text, str | int | float) or not str(text).strip():
            continue
        if "solution" in column:
            return final_answer(str(text), numeric=False) if "\\boxed" in str(text) else None
        return str(text).rsplit("####", 1)[-1].strip()
    return None


def _usage(row: Mapping[str, Any]) -> Usage:
    """Return what distilabel counted."""
    for name, counted in (row.get("distilabel_metadata") or {}).items():
        if name.startswith("statistics_") and isinstance(counted, dict):
            counts = [counted.get("input_tokens"), counted.get("output_tokens")]
            prompt, completion = (count[0] if isinstance(count, list) and count else count for count in counts)
            return Usage(int(prompt or 0), int(completion or 0), 0)
    return Usage(0, 0, 0)


def _first(row: Mapping[str, Any], columns: tuple[str, ...]) -> str | None:
    return next((row[name] for name in columns if isinstance(row.get(name), str) and row[name]), None)


def _item(row: Mapping[str, Any], column: str, index: int) -> Any:
    items = row.get(column)
    return items[index] if isinstance(items, list) and index < len(items) else None
