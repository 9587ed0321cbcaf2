"""A problem from one row of somebody's table: its messages, its options, its reference and its grader.

What a row says in columns of its own (earlier turns, a passage, options to choose from) becomes part of what the
teacher is asked. A row that cannot become a problem is an ArtifactError, which is counted and never the end.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from ...errors import ArtifactError, UsageError
from ...localrun.core.generation import Message
from ..graders.base import CannotTell, is_trusted, kind_of
from ..graders.choice import read_choices
from ..recipe.gathering import AskingRecipe
from ..records import NONE, Problem
from .columns import (
    PROBLEM_ALIASES,
    PROBLEM_ANSWERS,
    PROBLEM_CHOICES,
    PROBLEM_CONTEXTS,
    PROBLEM_METADATA,
    PROBLEM_QUESTIONS,
    PROBLEM_WORKED,
    Reference,
    Unusable,
    as_text,
    find_column,
    read_reference,
    read_turns,
)
from .files import Columns, Row
from .instruction import instructed, usual_instruction
from .shape import Labels, graded_as, grader_of, labels_of
from .split import question_id

PARAMETERS = ("question", "answer", "worked", "grader", "answers")
"""What a spec may say of a table's columns."""

_OPTION = re.compile(r"\s*[(\[]?([A-Z])[)\].:]\s*")


@dataclass
class Intake:
    """What became of a table's rows: how many were read, which could not be used, and which columns never were."""

    source: str
    params: Mapping[str, Any]
    asking: AskingRecipe = field(default_factory=AskingRecipe)
    labels: Labels | None = None
    n_rows: int = 0
    faults: list[ArtifactError] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)
    used: set[str] = field(default_factory=set)
    graded: Counter[str] = field(default_factory=Counter)

    def find_labels(self, rows: Iterator[tuple[str, Row]]) -> None:
        """Learn from the references of a table whether they are labels, if their shape is to choose the grader."""
        named = self.params.get("grader")
        if named == "label" or (named is None and self.asking.graders == "shape"):
            self.labels = labels_of(self._references(rows), named=named is not None)

    def _references(self, rows: Iterator[tuple[str, Row]]) -> Iterator[str]:
        for where, row in rows:
            with suppress(ArtifactError, Unusable):
                reference = None if isinstance(row, ArtifactError) else self._answer(row, where)[0].text
                if reference is not None:
                    yield reference

    def problems(self, rows: Iterator[tuple[str, Row]]) -> Iterator[Problem]:
        """Yield the problem of each row that has one.

        Raises:
            UsageError: `code` "no-such-grader" or "untrusted-grader" if a row names one.
            ArtifactError: `code` "no-problems" if there is no row, or the fault of the first row if no row is usable.
        """
        n_problems = 0
        for where, row in rows:
            self.n_rows += 1
            if isinstance(row, ArtifactError):
                self.faults.append(row)
                continue
            self.seen |= {str(name) for name, value in row.items() if value not in (None, "", [], {})}
            try:
                problem = self._problem(row, where)
            except ArtifactError as error:
                self.faults.append(error)
                continue
            n_problems += 1
            self.graded[graded_as(problem)] += 1
            yield problem
        if not self.n_rows:
            hint = "write one problem a line, with a question and an answer"
            raise ArtifactError(f"{self.source} has no problems", hint, code="no-problems")
        if not n_problems:
            raise self.faults[0]

    def notes(self) -> Iterator[str]:
        """Yield what a person should know: how rows are graded, which were left out, which columns were not used."""
        if self.faults:
            more = f", and {len(self.faults) - 1:,} more" if len(self.faults) > 1 else ""
            yield f"{len(self.faults):,} of {self.n_rows:,} rows are left out: {self.faults[0].message}{more}"
        if unused := sorted(self.seen - self.used):
            yield f"columns that are not used: {', '.join(unused[:12])}{', …' if len(unused) > 12 else ''}"
        graded = [f"{n:,} rows graded as {name}" for name, n in self.graded.most_common() if name]
        if graded:
            yield ", ".join([graded[0], *(text.replace(" rows graded", "", 1) for text in graded[1:])])
        if self.graded[""]:
            yield (
                f"{self.graded['']:,} rows are graded by nothing, as no grader compares long texts: --samples 8 lets "
                "samples vote, --judge MODEL has a model judge"
            )

    def _problem(self, row: Columns, where: str) -> Problem:
        try:
            turns = self._turns(row, where)
            found, metadata = self._answer(row, where)
            for column in PROBLEM_METADATA.values():
                self._find(row, None, column)
            metadata |= _metadata(row)
            asked = "\n".join(turn["content"] for turn in turns if turn["role"] == "user")
            shown = _shown_choices(metadata.get("choices"), asked)
            grader, needed = self._grader(row, found.text, metadata=metadata, where=where)
            metadata |= needed
            for text in (shown, metadata.get("worked"), *(turn["content"] for turn in turns)):
                as_text(text)  # what cannot be stored
        except Unusable as error:
            hint = "mend that row, or remove it"
            raise ArtifactError(f"{where} cannot be used: {error}", hint, code="bad-row") from error
        asked, question = asked + shown, turns[-1]["content"] + shown
        messages = instructed([*turns[:-1], {"role": "user", "content": question}], self._instruction(grader, metadata))
        kept = messages if len(messages) > 1 else []
        return Problem(question_id(asked), asked, found.text, self.source, grader, metadata, kept)

    def _instruction(self, grader: str, metadata: Mapping[str, Any]) -> str:
        if self.asking.instruction is None and self.asking.graders == "shape":
            return usual_instruction(grader, metadata)
        return self.asking.instruction or ""

    def _find(self, row: Columns, named: str | None, usual: tuple[str, ...]) -> str | None:
        column = find_column(row, named, usual)
        if column is not None:
            self.used.add(column)
        return column

    def _turns(self, row: Columns, where: str) -> list[Message]:
        """Return the conversation that a row asks: its earlier turns, and a last one of the user."""
        named = self.params.get("question")
        column = self._find(row, named, PROBLEM_QUESTIONS)
        if column is None:
            raise self._no_column("question", row, where)
        turns = read_turns(row[column])
        if turns is not None:
            while turns and turns[-1]["role"] == "assistant":
                turns = turns[:-1]
            if not turns or turns[-1]["role"] != "user" or not turns[-1]["content"].strip():
                raise Unusable(f"its {column} has no question of the user")
            return turns
        text = as_text(row[column])
        if text is None:
            hint = f"fill in the column {column}, or remove the row"
            raise ArtifactError(f"the question at {where} is empty", hint, code="empty-question")
        if named is None:
            context = self._find(row, None, PROBLEM_CONTEXTS)
            before = as_text(row[context]) if context and isinstance(row[context], str) else None
            after = None
            if column.lower() == "instruction" and (given := self._find(row, None, ("input",))):  # Alpaca
                after = as_text(row[given])
            text = "\n\n".join(filter(None, (before, text, after)))
        system = self._find(row, None, ("system", "system_prompt"))
        start = as_text(row[system]) if system else None
        return [*([{"role": "system", "content": start}] if start else []), {"role": "user", "content": text}]

    def _answer(self, row: Columns, where: str) -> tuple[Reference, dict[str, Any]]:
        """Return a row's reference answer, and the metadata that belongs to it: options, other wordings, a solution."""
        named = self.params.get("answer")
        choices = self._choices(row)
        column = self._find(row, named, PROBLEM_ANSWERS)
        if column is None and named is not None:
            raise self._no_column("answer", row, where)
        together = self.params.get("answers")
        value = None if column is None else row[column]
        found = Reference(None) if column is None else read_reference(value, together=together, column=column)
        metadata: dict[str, Any] = {}
        if choices:
            metadata["choices"] = choices
            if isinstance(value, int) and not isinstance(value, bool) and isinstance(choices, list):
                if not 0 <= value < len(choices):
                    raise Unusable(f"its answer {value} is none of its {len(choices)} options, which count from 0")
                found = Reference(chr(ord("A") + value))
        alias = self._find(row, None, PROBLEM_ALIASES)
        others = [text for text in map(as_text, _as_list(row[alias]) if alias else []) if text]
        if aliases := list(dict.fromkeys([*found.aliases, *others])):
            metadata["aliases"] = aliases
        elif found.together == "all":
            metadata["together"] = "all"
        return found, metadata | self._worked(row, found, answer=column, where=where)

    def _choices(self, row: Columns) -> Any:
        """Return the options of a row: a list, or an object of label to text; None without any."""
        column = self._find(row, None, PROBLEM_CHOICES)
        if column is not None and row[column]:
            return _plain_choices(json.loads(json.dumps(row[column], default=str)))
        lower = {str(key).lower(): key for key in row}
        if "opa" in lower:  # MedMCQA
            columns = [lower[name] for name in ("opa", "opb", "opc", "opd") if name in lower]
        elif "incorrect answer 1" in lower and "correct answer" in lower:  # GPQA, whose right one must not stand first
            columns = [key for name, key in lower.items() if re.fullmatch(r"(?:in)?correct answer(?: \d)?", name)]
            columns.sort(key=lambda name: hashlib.sha256(str(row[name]).encode("utf-8", "replace")).digest())
        else:
            return None
        self.used |= set(columns)
        return [as_text(row[name]) or "" for name in columns]

    def _worked(self, row: Columns, found: Reference, *, answer: str | None, where: str) -> dict[str, Any]:
        """Return the worked solution of a row: its named column, a usual one, or what came with its answer."""
        named = self.params.get("worked")
        usual = tuple(name for name in PROBLEM_WORKED if name != (answer or "").lower())
        column = self._find(row, named, usual)
        if named is not None and column is None:
            raise self._no_column("worked", row, where)
        text = row[column] if column is not None else found.worked
        return {"worked": text} if isinstance(text, str) and text.strip() else {}

    def _grader(
        self, row: Columns, gold: str | None, *, metadata: Mapping[str, Any], where: str
    ) -> tuple[str, dict[str, Any]]:
        """Return the grader that the spec names, the row's own, or the one that its columns or its reference call for.

        With it comes the metadata that it needs.
        """
        if self.params.get("grader") is not None:
            labels = {"choices": list(self.labels.names), "several": self.labels.several} if self.labels else {}
            return str(self.params["grader"]), labels
        column = self._find(row, None, ("grader",))
        if column is not None and row[column]:
            grader = str(row[column])
            check_grader(grader, where)
            if is_trusted(grader):
                raise UsageError(
                    f"{where} names the grader {grader}, which runs code without a sandbox",
                    f"if you trust it, name it yourself: ?grader={grader}",
                    code="untrusted-grader",
                )
            return grader, {}
        if "tests" in metadata or gold is None:
            return ("python" if "tests" in metadata else NONE), {}
        if "choices" in metadata:
            return "choice", {}
        return ("math", {}) if self.asking.graders == "columns" else grader_of(gold, self.labels)

    def _no_column(self, parameter: str, row: Columns, where: str) -> ArtifactError:
        named = self.params.get(parameter)
        missing = f"no column {named}" if named is not None else f"no {parameter} column"
        return ArtifactError(
            f"{where} has {missing}; it has {', '.join(map(str, row))}",
            f"name the column: '{self.source}?{parameter}=COLUMN'",
            code="no-such-column",
        )


def check_grader(grader: str, where: str = "") -> None:
    """Return if there is such a grader.

    Raises:
        UsageError: `code` "no-such-grader"; its message names the place.
    """
    try:
        if grader != NONE:
            kind_of(grader)
    except UsageError as error:
        raise UsageError(
            f"{where}: {error.message}" if where else error.message, error.hint, code=error.code
        ) from error


def _metadata(row: Columns) -> dict[str, Any]:
    """Return what graders need beside the answer, by the name that they know it by."""
    found = {}
    for name, columns in PROBLEM_METADATA.items():
        column = find_column(row, None, columns)
        if column is not None and row[column] not in (None, "", [], {}):
            found[name] = json.loads(json.dumps(row[column], default=str))
    return found


def _plain_choices(choices: Any) -> Any:
    """Return options without the letters that their texts begin with: AQuA's `A)21`."""
    if isinstance(choices, list) and all(isinstance(text, str) for text in choices):
        led = [_OPTION.match(text) for text in choices]
        if all(match and match[1] == chr(ord("A") + i) for i, match in enumerate(led)):
            return [text[match.end() :] for text, match in zip(choices, led, strict=True) if match]
    return choices


def _shown_choices(choices: Any, question: str) -> str:
    """Return the options as lines to show after a question; nothing if the question has them already."""
    try:
        labelled = read_choices(choices)
    except CannotTell as error:
        raise Unusable(str(error)) from error
    if all(text in question for text in labelled.values()):
        return ""
    return "\n" + "".join(f"\n{label}. {text}" for label, text in labelled.items())


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]
