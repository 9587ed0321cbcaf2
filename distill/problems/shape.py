"""The grader of a row, from the shape of its reference: JSON, a date, a number with a unit, a label, long text.

Everything else is graded as mathematics, where a text is right if it is the same. Labels are known by the file as a
whole: a few short texts that come again and again.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from ...localrun.core.text import shorten
from ..graders import date
from ..graders.answer import clean
from ..graders.label import key, split
from ..graders.quantity import parse
from ..graders.units import measured
from ..records import NONE, Problem

_MOST, _LEAST = 30, 2  # labels in a file; rows of each
_RARE = 0.05  # share of the labelled rows whose label may come only once: a slip of the pen
_LONG_WORDS = 10
_FORMULA = re.compile(r"[\\$={}\[\]<>|^]|(?<![A-Za-z])\w\s*[-+*/]\s*\w(?![A-Za-z])|\d\s*[-+*/:]\s*\d")


@dataclass(frozen=True)
class Labels:
    """The labels of a file; with `several` a reference may list more than one of them."""

    names: tuple[str, ...]
    several: bool = False

    def holds(self, reference: str) -> bool:
        """Say whether a reference is one of the labels, or a list of them."""
        keys = set(map(key, self.names))
        return key(reference) in keys or (self.several and set(split(reference)) <= keys)


def labels_of(references: Iterable[str], *, named: bool = False) -> Labels | None:
    """Return the labels that the references of a file are; None if they are not labels.

    Labels are at most 30 distinct short texts, each there at least twice; of many rows one in twenty may break that.
    With `named` the user says that they are labels, and only their number counts.
    """
    texts, spellings = Counter[str](), dict[str, Counter[str]]()
    for text in references:
        if _may_be_label(text):
            texts[key(text)] += 1
            spellings.setdefault(key(text), Counter())[clean(text)] += 1
            if len(texts) > 1000:
                return None
    several = _list_several(texts)
    if several:
        texts = Counter(part for text, n in texts.items() for part in split(text) * n)
        for spelling in (spelling for counts in list(spellings.values()) for spelling in list(counts)):
            for part in re.split(r"[,;|]", spelling):
                spellings.setdefault(key(part), Counter())[clean(part)] += 1
    n_rare = sum(n for n in texts.values() if n < _LEAST)
    if not 1 < len(texts) <= _MOST or (not named and n_rare > _RARE * texts.total()):
        return None
    return Labels(tuple(spellings[text].most_common(1)[0][0] for text in sorted(texts)), several)


def grader_of(reference: str, labels: Labels | None = None) -> tuple[str, dict[str, Any]]:
    """Return the grader that a reference calls for, and the metadata that it needs."""
    if labels is not None and _may_be_label(reference) and labels.holds(reference):
        if all(len(name) == 1 for name in labels.names):  # the letters of options that the question has
            return "choice", {"choices": {name.upper(): name for name in labels.names}}
        return "label", {"choices": list(labels.names)} | ({"several": True} if labels.several else {})
    if _is_json(reference):
        return "json", {}
    if date.read(reference) is not None:
        return "date", {}
    quantity = parse(clean(reference))
    if quantity is not None and quantity.unit and measured(Fraction(1), quantity.unit):
        return "number", {}
    return (NONE if is_long(reference) else "math"), {}


def is_long(reference: str) -> bool:
    """Say whether a reference is a text that no grader can compare: sentences, without any formula."""
    if re.search(r"[\\$=]", reference) or parse(clean(reference)) is not None:
        return False
    return len(re.findall(r"[^\W\d_]{2,}", reference)) >= _LONG_WORDS


_NAMES = {"math": "mathematics", "number": "numbers", "date": "dates", "json": "JSON", "python": "code"}


def graded_as(problem: Problem) -> str:
    """Return how a problem is graded, in words; empty if nothing grades it."""
    kind, choices = problem.grader.partition(":")[0], problem.metadata.get("choices")
    if kind == "label" or (isinstance(choices, dict) and all(name == str(choices[name]).upper() for name in choices)):
        return f"labels ({shorten(', '.join(choices or ()), 200)})"
    if kind == "math" and problem.answer and not re.search(r"[\d\\]|\b\w\b", problem.answer):
        return "words that have to be the same"
    return "" if kind == NONE else _NAMES.get(kind, problem.grader)


def _may_be_label(text: str) -> bool:
    if len(text) > 200 or "\n" in text.strip() or not re.search(r"[^\W\d_]", text):
        return False
    if _FORMULA.search(text.replace("|", ",")) and clean(text).casefold() != "n/a":
        return False
    is_short = all(len(part) <= 40 and len(part.split()) <= 5 for part in re.split(r"[,;|]", text))
    return is_short and parse(clean(text)) is None and date.read(text) is None


def _list_several(texts: Iterable[str]) -> bool:
    """Say whether some of the texts are lists of labels, all of whose parts come in other texts too."""
    places: dict[str, set[str]] = {}
    listed = set[str]()
    for text in texts:
        for part in split(text):
            places.setdefault(part, set()).add(text)
        listed |= set(split(text)) if len(split(text)) > 1 else set()
    return bool(listed) and all(len(places[part]) > 1 for part in listed)


def _is_json(text: str) -> bool:
    """Say whether a text is a JSON object, or a JSON list that holds more than numbers."""
    if text.strip()[:1] not in ("{", "["):
        return False
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) or _has_words(value)


def _has_words(value: Any) -> bool:
    if isinstance(value, list):
        return any(map(_has_words, value))
    return isinstance(value, str | dict | bool) or value is None
