"""The student's own verified traces as token ids, in three parts that share no problem.

The first makes the importance matrix, the second chooses the types, the third measures the result. A trace is rendered
with the file's own template and tokenized by llama.cpp, prompt and reply apart, just as the student was trained on it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ...errors import ArtifactError, ModelError, UsageError
from ...localrun.core.record_log import whole_lines
from ...localrun.engine.llama import Model
from ..convert.files import sha256_of
from ..recipe import CalibrationRecipe

Purpose = Literal["calibrate", "choose", "measure"]
_SHARES: tuple[tuple[int, Purpose], ...] = ((60, "calibrate"), (75, "choose"), (100, "measure"))  # upper bounds in %


@dataclass(frozen=True)
class Text:
    """Token ids of a trace: `n_prompt` of the prompt, then those of the reply, `n_thinking` of them reasoning."""

    tokens: tuple[int, ...]
    n_prompt: int
    n_thinking: int = 0


@dataclass(frozen=True)
class Texts:
    """The traces by purpose, and the SHA-256 of the file that they came from and of its later verdicts."""

    heal: tuple[Text, ...] = ()  # starts with those that calibrate
    calibrate: tuple[Text, ...] = ()
    choose: tuple[Text, ...] = ()
    measure: tuple[Text, ...] = ()
    sha256: str = ""


def purpose_of(question: str) -> Purpose:
    """Return what all traces of a problem are used for, by a hash of its normalized question."""
    key = " ".join(question.lower().split())
    share = int(hashlib.sha256(b"quantize\0" + key.encode("utf-8", "replace")).hexdigest()[:8], 16) % 100
    return next(purpose for bound, purpose in _SHARES if share < bound)


def read_texts(traces_path: Path, model_path: Path, settings: CalibrationRecipe) -> Texts:
    """Read verified traces as the model in a GGUF sees them.

    Raises:
        ArtifactError: `code` "file-unreadable", or "trace-broken": a line is not a trace.
        UsageError: `code` "too-few-traces": the three parts cannot be filled.
        ModelError: `code` "no-chat-template", or "template-mismatch": it renders an answer differently from how it
            prompts for one.
    """
    with closing(Model(model_path)) as model:
        texts = _by_purpose(traces_path, model, settings)
    if empty := [purpose for purpose, found in texts.items() if not found]:
        raise UsageError(
            f"{traces_path} has too few verified traces: none is left to {empty[0]} with",
            "a hundred traces are enough",
            code="too-few-traces",
        )
    return Texts(
        heal=tuple(texts["calibrate"]),
        calibrate=tuple(_first(texts["calibrate"], settings.n_calibrate)),
        choose=tuple(texts["choose"]),
        measure=tuple(texts["measure"]),
        sha256=_hash(traces_path),
    )


def _by_purpose(traces_path: Path, model: Model, settings: CalibrationRecipe) -> dict[Purpose, list[Text]]:
    """Return as many texts of each purpose as the settings ask for."""
    n_calibrate = max(settings.n_calibrate, settings.n_heal)
    limits: dict[Purpose, int] = {"calibrate": n_calibrate, "choose": settings.n_choose, "measure": settings.n_measure}
    texts: dict[Purpose, list[Text]] = {purpose: [] for purpose in limits}
    counts = dict.fromkeys(limits, 0)
    for trace in _verified(traces_path):
        purpose = purpose_of(trace["messages"][-1]["content"])
        if counts[purpose] >= limits[purpose]:
            continue
        text = _render(model, trace, settings.max_length)
        counts[purpose] += len(text.tokens) - (0 if purpose == "calibrate" else text.n_prompt)
        texts[purpose].append(text)
    return texts


def _first(texts: Sequence[Text], n_tokens: int) -> Iterator[Text]:
    for text in texts:
        if n_tokens <= 0:
            return
        yield text
        n_tokens -= len(text.tokens)


def _verdicts_path(traces_path: Path) -> Path:
    """Return the file of the verdicts that votes and judges gave on stored traces (docs/traces.md)."""
    return traces_path.with_name(f"{traces_path.stem}.verdicts.jsonl")


def _hash(traces_path: Path) -> str:
    found, verdicts = sha256_of(traces_path), _verdicts_path(traces_path)
    if not verdicts.is_file() or not verdicts.stat().st_size:
        return found
    return hashlib.sha256(f"{found} {sha256_of(verdicts)}".encode()).hexdigest()


def _judged(path: Path) -> dict[str, str]:
    """Return who judged each trace last, by its id; torn and foreign lines are skipped."""
    judged: dict[str, str] = {}
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        with suppress(ValueError, KeyError, TypeError):
            verdict = json.loads(line)
            judged[verdict["id"]] = verdict["verdict_by"]
    return judged


def _verified(path: Path) -> Iterator[dict[str, Any]]:
    judged = _judged(_verdicts_path(path))
    for number, line in whole_lines(path):
        try:
            trace = json.loads(line)
            by = trace.get("verdict_by")
            by = by if by == "grader" else judged.get(trace.get("id"), by)
            is_verified = trace["verdict"] == "right" or by in ("vote", "judge")
            trace["messages"][-1]["content"] + trace["content"]  # both are texts
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise ArtifactError(f"line {number} of {path} is not a trace: {error}", code="trace-broken") from error
        if is_verified and trace.get("finish_reason", "stop") == "stop":
            yield trace


def _render(model: Model, trace: Mapping[str, Any], max_length: int) -> Text:
    eos = model.special_text("eos")
    messages: Sequence[Mapping[str, Any]] = trace["messages"]
    answer = {"role": "assistant", "content": trace["content"], "reasoning_content": trace.get("reasoning_content")}
    prompt = model.render(messages)
    whole = model.render([*messages, answer], asks=False)
    if not whole.startswith(prompt):
        raise ModelError(
            "the chat template renders an answer differently from how it prompts for one", code="template-mismatch"
        )
    reply = whole[len(prompt) :]
    end = reply.rfind(eos) if eos else -1
    reply = reply[: end + len(eos)] if end >= 0 else reply
    prompt_tokens = model.tokenize(prompt)
    tokens = prompt_tokens + model.tokenize(reply, whole=False)
    n_thinking = len(model.tokenize(trace.get("reasoning_content") or "", whole=False))
    return Text(tuple(tokens[:max_length]), min(len(prompt_tokens), max_length - 1), n_thinking)
