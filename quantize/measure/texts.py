"""The student's own verified traces as token ids, in three parts that share no problem.

One part makes the importance matrix, one chooses the types, one measures what came out. A trace is rendered with the
file's own template and tokenized by llama.cpp, prompt and reply apart, as it was taught.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ...errors import ArtifactError, ModelError, UsageError
from ...localrun.engine.llama import Model
from ...localrun.families import template

Part = Literal["calibrate", "choose", "measure"]
_SHARES: tuple[tuple[int, Part], ...] = ((60, "calibrate"), (75, "choose"), (100, "measure"))  # upper bounds, per cent


@dataclass(frozen=True)
class CalibrationSettings:
    """How many tokens of each part are read, at most; of `choose` and `measure` the replies' alone are counted.

    Healing reads the traces that calibrate, and more of that part, `n_heal` tokens in all.
    """

    n_calibrate: int = 8_192
    n_heal: int = 0
    n_choose: int = 256
    n_measure: int = 2_048
    max_length: int = 2_048  # tokens of a trace; longer ones are cut


@dataclass(frozen=True)
class Text:
    """Token ids of a trace; the first `n_prompt` are not the model's own. `n_thinking` of the others are reasoning."""

    tokens: tuple[int, ...]
    n_prompt: int
    n_thinking: int = 0


@dataclass(frozen=True)
class Texts:
    """The traces by what they are for, and the SHA-256 of the file that they came from, with what was judged later."""

    heal: tuple[Text, ...] = ()  # those that calibrate come first
    calibrate: tuple[Text, ...] = ()
    choose: tuple[Text, ...] = ()
    measure: tuple[Text, ...] = ()
    source: str = ""
    sha256: str = ""


def part_of(question: str) -> Part:
    """Return the part that all traces of a problem belong to, by a hash of its normalised question."""
    key = " ".join(question.lower().split())
    share = int(hashlib.sha256(b"quantize\0" + key.encode("utf-8", "replace")).hexdigest()[:8], 16) % 100
    return next(part for bound, part in _SHARES if share < bound)


def read_texts(traces_path: Path, model_path: Path, settings: CalibrationSettings = CalibrationSettings()) -> Texts:
    """Read verified traces as the model in a GGUF sees them.

    Raises:
        ArtifactError: there is no such file, or a line of it is no trace.
        UsageError: it holds too few verified traces to fill the three parts.
        ModelError: the template refuses a trace, or renders an answer differently from how it prompts for one.
    """
    model = Model(model_path)
    try:
        n_calibrate = max(settings.n_calibrate, settings.n_heal)
        limits = {"calibrate": n_calibrate, "choose": settings.n_choose, "measure": settings.n_measure}
        taken: dict[str, list[Text]] = {part: [] for part in limits}
        counts = dict.fromkeys(limits, 0)
        for trace in _verified(traces_path):
            part = part_of(trace["messages"][-1]["content"])
            if counts[part] >= limits[part]:
                continue
            text = _render(model, trace, settings.max_length)
            counts[part] += len(text.tokens) - (0 if part == "calibrate" else text.n_prompt)
            taken[part].append(text)
    finally:
        model.close()
    if empty := [part for part, texts in taken.items() if not texts]:
        raise UsageError(f"{traces_path} holds too few verified traces: none to {empty[0]} with", "a hundred will do")
    return Texts(
        tuple(taken["calibrate"]),
        tuple(_first(taken["calibrate"], settings.n_calibrate)),
        tuple(taken["choose"]),
        tuple(taken["measure"]),
        str(traces_path),
        _hash(traces_path),
    )


def _first(texts: Sequence[Text], n_tokens: int) -> Iterator[Text]:
    for text in texts:
        if n_tokens <= 0:
            return
        yield text
        n_tokens -= len(text.tokens)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file.

    Raises:
        ArtifactError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror}") from error


def _verdicts_path(traces_path: Path) -> Path:
    """Return where votes and judges' verdicts on stored traces stand (docs/traces.md)."""
    return traces_path.with_name(f"{traces_path.stem}.verdicts.jsonl")


def _hash(traces_path: Path) -> str:
    found, verdicts = sha256_of(traces_path), _verdicts_path(traces_path)
    if not verdicts.is_file() or not verdicts.stat().st_size:
        return found
    return hashlib.sha256(f"{found} {sha256_of(verdicts)}".encode()).hexdigest()


def _judged(path: Path) -> dict[str, str]:
    """Return who vouches for a trace by its id, from its last line; a torn or foreign line says nothing."""
    judged: dict[str, str] = {}
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        with suppress(ValueError, KeyError, TypeError):
            one = json.loads(line)
            judged[one["id"]] = one["verdict_by"]
    return judged


def _verified(path: Path) -> Iterator[dict[str, Any]]:
    try:
        lines, judged = path.read_bytes().splitlines(), _judged(_verdicts_path(path))
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror}", "give --traces FILE, or --imatrix none") from error
    for number, line in enumerate(lines, 1):
        try:
            trace = json.loads(line)
            by = trace.get("verdict_by")
            by = by if by == "grader" else judged.get(trace.get("id"), by)
            is_verified = trace["verdict"] == "right" or by in ("vote", "judge")
            trace["messages"][-1]["content"] + trace["content"]  # both are texts
        except (ValueError, KeyError, TypeError, IndexError) as error:
            if number == len(lines):  # a torn last line is no fault
                return
            raise ArtifactError(f"{path}, line {number} is no trace: {error}") from error
        if is_verified and trace.get("finish_reason", "stop") == "stop":
            yield trace


def _render(model: Model, trace: Mapping[str, Any], max_length: int) -> Text:
    source = model.metadata.get("tokenizer.chat_template")
    if not source:
        raise ModelError(f"{model.path} has no chat template", "use an instruction-tuned model")
    ids = (model.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos"))
    bos, eos = ("" if one is None else model.piece(int(one)).decode("utf-8", "replace") for one in ids)
    messages: Sequence[Mapping[str, Any]] = trace["messages"]
    answer = {"role": "assistant", "content": trace["content"], "reasoning_content": trace.get("reasoning_content")}
    prompt = template.render(source, messages, thinking=True, bos_token=bos, eos_token=eos)
    whole = template.render(source, [*messages, answer], thinking=True, bos_token=bos, eos_token=eos, asks=False)
    if not whole.startswith(prompt):
        raise ModelError("the chat template renders an answer differently from how it prompts for one")
    reply = whole[len(prompt) :]
    end = reply.rfind(eos) if eos else -1
    reply = reply[: end + len(eos)] if end >= 0 else reply
    asked = model.tokenize(prompt)
    tokens = asked + model.tokenize(reply, whole=False)
    n_thinking = len(model.tokenize(trace.get("reasoning_content") or "", whole=False))
    return Text(tuple(tokens[:max_length]), min(len(asked), max_length - 1), n_thinking)
