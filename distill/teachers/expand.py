"""New problems like given ones, written by the teacher: `--expand N` asks for N new ones to each.

A model writes as it likes, so its text is read leniently and checked strictly: a problem that cannot be read, repeats a
given or an earlier one, belongs to the held-out part of the split or overlaps with an evaluation question is dropped
and counted. New problems have no answer: a vote or a judge decides which of their traces are right.

Source: Self-Instruct, Wang et al., arXiv 2212.10560; near-duplicates and contamination are found as in curation.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...localrun.core.generation import Message
from ..problems.instruction import instructed, shared_system
from ..problems.similarity import contaminated, near_duplicates, numbers_in, sign_texts, word_hashes
from ..problems.split import bucket_of, question_id
from ..recipe.gathering import ExpandRecipe
from ..records import Problem, messages_of
from .ask_once import Ask, StoredReplies, StoredReply, ask_id, stored_replies

DROPPED = {
    "malformed": "too short, too long, cut off or a placeholder",
    "copy": "a given problem, or one that was written before",
    "held_out": "the question is not in the training bucket of the split",
    "contaminated": "the question overlaps with an evaluation question",
    "near_duplicate": "nearly the same words and the same numbers as a given or an earlier problem",
}
_A_REQUEST = 8  # problems: with more, models start to repeat themselves
_SHORTEST, _LONGEST = 12, 4000  # characters

_EXAMPLE = "A baker sells 3 kinds of bread and bakes 14 loaves of each. By noon 25 are sold. How many are left?"
_EXAMPLE_NEW = [
    "A school orders 6 boxes of 24 pencils and hands out 96 of them in the first week. How many pencils remain?",
    "Lena reads 18 pages on each of 5 days, and her book has 130 pages. How many pages does she still have to read?",
]
_KEYS = ("problem", "question", "prompt", "text", "task", "instruction")
_NUMBERED = re.compile(r"^\s*(?:[#>*_\s]*)(?:(?:problem|question)\s*)?\d{1,3}\s*[.):]\**\s*", re.IGNORECASE)
_BULLET = re.compile(r"^\s*[-*•]\s+")
_TITLE = re.compile(r"^(?:<problem>|\W*(?:problem|question)\W*:\W*)", re.IGNORECASE)
_SOLVED = re.compile(r"^\W*(?:answer|solution|explanation|hint)\b\W*:.*", re.IGNORECASE | re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Expanded:
    """The new problems in the order of the given ones, how many were written and dropped by reason, an example each."""

    problems: list[Problem]
    n_written: int
    dropped: dict[str, int]
    examples: dict[str, str]
    replies: StoredReplies


def expand(
    given: Sequence[Problem],
    settings: ExpandRecipe,
    *,
    teacher: str,
    ask: Callable[[list[Ask]], StoredReplies],
    evaluation: Iterable[str] = (),
) -> Expanded:
    """Return new problems like the given ones. The same replies give the same problems in the same order.

    `teacher` is the string that the user gave; `ask` asks it what it was not asked before (see `ask_once`);
    `evaluation` has the questions that no new problem may touch.
    """
    asks = list(_asks(given, settings, teacher))
    replies = ask([one for one, _, _ in asks])
    written = [
        (text, origin)
        for one, origin, n in asks
        if (reply := replies.by_id.get(one.id))
        for text in read_problems(reply)[:n]
    ]
    sieve = _Sieve(given, settings)
    problems = sieve.sift(written, list(evaluation))
    return Expanded(problems, len(written), sieve.dropped, sieve.examples, replies)


def missing_expansions(given: Sequence[Problem], settings: ExpandRecipe, *, path: Path, teacher: str) -> list[Ask]:
    """Return the requests that `expand` would pay for: those whose replies the file lacks.

    Raises:
        ArtifactError: the file is broken.
    """
    stored = stored_replies(path)
    return [ask for ask, _, _ in _asks(given, settings, teacher) if ask.id not in stored]


def read_problems(reply: StoredReply) -> list[str]:
    """Return the problems in a reply: a JSON array, JSON lines, or a numbered or bulleted list.

    An item without a question comes back empty, to be counted. The last item of a list that was cut off is left out: it
    may be incomplete.
    """
    text = re.sub(r"^\s*```\w*\s*$", "", reply.content, flags=re.MULTILINE).strip()
    if (items := _from_json(text)) is not None:
        return [_tidy(item) for item in items]
    listed = _from_list(text, _NUMBERED) or _from_list(text, _BULLET)
    if reply.finish_reason != "stop":
        listed = listed[:-1]
    return [_tidy(item) for item in listed]


def _asks(given: Sequence[Problem], settings: ExpandRecipe, teacher: str) -> Iterator[tuple[Ask, Problem, int]]:
    """Yield (request, the given problem, the number of new ones it asks for)."""
    for problem in given:
        for part, start in enumerate(range(0, settings.n, _A_REQUEST)):
            n = min(_A_REQUEST, settings.n - start)
            messages = _messages(problem.question, n)
            yield (
                Ask(ask_id("expand", teacher, asdict(settings.sampling), messages, part), messages),
                problem,
                n,
            )


def _messages(question: str, n: int) -> list[Message]:
    return [
        {"role": "user", "content": _instruction(_EXAMPLE, len(_EXAMPLE_NEW))},
        {"role": "assistant", "content": json.dumps(_EXAMPLE_NEW, indent=1)},
        {"role": "user", "content": _instruction(question, n)},
    ]


def _instruction(question: str, n: int) -> str:
    return (
        f"Write {n} new problem{'s' if n > 1 else ''} like this one:\n\n<problem>\n{question.strip()}\n</problem>\n\n"
        "The same kind and difficulty, but other facts, numbers and wording: a new problem, not the old one put "
        "differently. Each is complete in itself and can be answered. Do not solve it. Reply with a JSON array of "
        f"{n} string{'s' if n > 1 else ''} and nothing else."
    )


class _Sieve:
    """Drops texts that are not new training problems, counts them by reason, and keeps an example of each."""

    def __init__(self, given: Sequence[Problem], settings: ExpandRecipe) -> None:
        self.given, self.settings = given, settings
        self.dropped = dict.fromkeys(DROPPED, 0)
        self.examples: dict[str, str] = {}

    def sift(self, written: list[tuple[str, Problem]], evaluation: list[str]) -> list[Problem]:
        """Return those of (question, the given problem) that are new, as problems."""
        seen = {question_id(text) for text in (*(p.question for p in self.given), _EXAMPLE, *_EXAMPLE_NEW)}
        fresh = []
        for text, origin in written:
            if reason := self._reason(text, seen):
                self._drop(reason, text)
            else:
                seen.add(question_id(text))
                fresh.append((text, origin))
        exams, new = [word_hashes(text) for text in evaluation], [word_hashes(text) for text, _ in fresh]
        fresh = self._without("contaminated", fresh, contaminated(new, exams, self.settings.ngram))
        fresh = self._without("near_duplicate", fresh, self._repeated([text for text, _ in fresh]))
        return [_new_problem(text, origin) for text, origin in fresh]

    def _reason(self, text: str, seen: set[str]) -> str | None:
        if not (_SHORTEST <= len(text) <= _LONGEST and re.search(r"\w\W+\w", text)):
            return "malformed"
        if question_id(text) in seen:
            return "copy"
        return None if bucket_of(text) == "train" else "held_out"

    def _repeated(self, texts: list[str]) -> npt.NDArray[np.int64]:
        words = [word_hashes(text) for text in (*(problem.question for problem in self.given), *texts)]
        numbers = np.array([numbers_in(one) for one in words], np.uint64)
        signatures = np.array([sign_texts(one) for one in words]).reshape(len(words), -1)
        if not len(words):
            return np.zeros(0, np.int64)
        found = near_duplicates(signatures, self.settings.similarity, lambda i, others: numbers[others] == numbers[i])
        return found[len(self.given) :]

    def _without(
        self, reason: str, fresh: list[tuple[str, Problem]], found: npt.NDArray[np.int64]
    ) -> list[tuple[str, Problem]]:
        for (text, _), index in zip(fresh, found.tolist(), strict=True):
            if index >= 0:
                self._drop(reason, text)
        return [one for one, index in zip(fresh, found.tolist(), strict=True) if index < 0]

    def _drop(self, reason: str, text: str) -> None:
        self.dropped[reason] += 1
        self.examples.setdefault(reason, text)


def _new_problem(text: str, origin: Problem) -> Problem:
    told = shared_system([messages_of(origin)])
    return Problem(
        id=question_id(text),
        question=text,
        answer=None,
        source=f"expand:{origin.source}",
        grader="none",
        metadata={"expanded_from": origin.id},
        messages=instructed([{"role": "user", "content": text}], told) if told else [],
    )


def _from_json(text: str) -> list[Any] | None:
    """Return the items of the JSON in a text: an array's, those in an object, one a line; None if there is none."""
    start = text.find("[")
    items = _array(text, start) if start >= 0 else []
    if any(isinstance(item, str | dict) for item in items):
        return items
    lines = [line.strip().rstrip(",") for line in text.splitlines() if line.strip().startswith("{")]
    return [value for line in lines if (value := _loads(line)) is not None] or None


def _array(text: str, start: int) -> list[Any]:
    """Return the items of an array, up to where it is cut off or broken.

    A string that continues behind its closing quote had quotes in it that were not escaped: it is left out.
    """
    whole = _loads(text[start : text.rfind("]") + 1])
    if isinstance(whole, list):
        return whole
    items: list[Any] = []
    decoder, at = json.JSONDecoder(strict=False), start + 1
    while True:
        while at < len(text) and text[at] in " \t\r\n,":
            at += 1
        try:
            item, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):  # a model that loops may open brackets without end
            return items
        rest = text[at:].partition("\n")[0].strip()
        if rest and rest[0] not in ",]}":
            return items
        items.append(item)


def _loads(text: str) -> Any:
    try:
        return json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return None


def _from_list(text: str, mark: re.Pattern[str]) -> list[str]:
    """Return the items of a list, each from its mark to the next mark."""
    items: list[list[str]] = []
    for line in text.splitlines():
        if mark.match(line):
            items.append([mark.sub("", line, count=1)])
        elif items:
            items[-1].append(line)
    return ["\n".join(lines) for lines in items]


def _tidy(item: Any) -> str:
    """Return an item's problem text without its number, quotes or solution; "" if it has none."""
    if isinstance(item, dict):
        lower = {str(key).lower(): value for key, value in item.items()}
        item = next((lower[key] for key in _KEYS if key in lower), "")
    if not isinstance(item, str):
        return ""
    text = _SOLVED.sub("", _NUMBERED.sub("", item, count=1))
    text = _TITLE.sub("", text.encode("utf-8", "ignore").decode().strip()).removesuffix("</problem>").strip()
    for left, right in (("**", "**"), ('"', '"'), ("“", "”")):
        if len(text) > len(left + right) and text.startswith(left) and text.endswith(right):
            text = text[len(left) : -len(right)].strip()
    return text
