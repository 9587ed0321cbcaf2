"""Which traces train, and what each filter drops: traces should be verified, whole, distinct, and not too many alike.

The traces are read twice. The first pass looks at each trace alone and keeps some numbers of those that pass (200 to
1,000 bytes, with a MinHash signature). Duplicates, evaluation questions and the caps are decided on these numbers. The
second pass yields the traces that stay. So memory holds no text, however many traces there are.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from ...localrun.core.reporter import SILENT, Reporter
from ...localrun.core.settings import values_of
from ...localrun.core.text import shorten
from ..problems.similarity import (
    N_HASHES,
    Words,
    contaminated,
    digest,
    near_duplicates,
    numbers_in,
    sign_questions,
    sign_texts,
    word_hashes,
)
from ..problems.split import same_meaning
from ..recipe.gathering import CurationRecipe
from ..records import Problem, Trace
from .filters import FILTERS, N_EXCERPT, excerpt, fault_of, fault_of_text, question_of

_SHORT = 300  # characters of reasoning and answer: less says little more than the answer, which many questions share


@dataclass(frozen=True)
class Selection:
    """The traces that train: iterating reads the source again and yields them in order. `record` is curation.json."""

    source: Callable[[], Iterable[Trace]]
    positions: npt.NDArray[np.int64]  # in the source, ascending
    record: dict[str, Any]

    def __len__(self) -> int:
        return len(self.positions)

    def __iter__(self) -> Iterator[Trace]:
        return _at(self.source(), self.positions)


def select(
    source: Callable[[], Iterable[Trace]],
    settings: CurationRecipe | None = None,
    *,
    evaluation: Iterable[str] = (),
    pass_rate: Mapping[str, float] | None = None,
    seed: int = 0,
) -> Selection:
    """Decide which traces train. `source()` has to give the same traces at every call.

    `evaluation` has the questions that the student will be scored on. `pass_rate` says by problem id how often the
    untrained student solves a problem; one that it lacks counts as neither easy nor hard.
    """
    settings = settings or CurationRecipe()
    record = _Record(settings)
    survey = _Survey(settings, pass_rate or {}, record)
    for trace in source():
        survey.add(trace)
    decision = _Decision(survey, settings, record=record, seed=seed)
    decision.take_unjudged()
    decision.take_contaminated(list(evaluation))
    decision.take_same_questions()
    decision.take_same_traces()
    decision.take_over_keep()
    decision.take_over_source()
    positions = np.frombuffer(survey.position, np.int64)[decision.stays]
    return Selection(source, positions, record.finish(source, survey, len(positions)))


class _Record:
    """Counts the traces that each filter drops, and remembers the position of its first example."""

    def __init__(self, settings: CurationRecipe) -> None:
        self.settings = settings
        self.dropped: Counter[str] = Counter()
        self.first: dict[str, tuple[int, int | str]] = {}  # position, and the position or text that it resembles

    def take(self, name: str, position: int, *, like: int | str = "", count: int = 1) -> None:
        self.dropped[name] += count
        self.first.setdefault(name, (position, like))

    def finish(self, source: Callable[[], Iterable[Trace]], survey: _Survey, n_kept: int) -> dict[str, Any]:
        wanted = sorted({p for pair in self.first.values() for p in pair if isinstance(p, int)})
        found = dict(zip(wanted, _at(source(), np.array(wanted, np.int64)), strict=True))
        examples = {}
        for name, (position, like) in self.first.items():
            example = {"id": found[position].id, "excerpt": excerpt(found[position])}
            if isinstance(like, int):
                example |= {"like": found[like].id, "like_excerpt": excerpt(found[like])}
            elif like:
                example["like_excerpt"] = shorten(like, N_EXCERPT)
            examples[name] = example
        names = [name for name in FILTERS if self.dropped[name]]
        return {
            "traces": survey.n_traces,
            "problems": len(survey.problems),
            "kept": n_kept,
            "dropped": {name: self.dropped[name] for name in names},
            "why": FILTERS,
            "examples": {name: examples[name] for name in names},
            "settings": values_of(self.settings),
        }


class _Survey:
    """The first pass: some numbers of each survivor, a trace that no filter drops by itself."""

    def __init__(self, settings: CurationRecipe, pass_rate: Mapping[str, float], record: _Record) -> None:
        self.settings, self.pass_rate, self.record = settings, pass_rate, record
        self.n_traces = 0
        self.problems: dict[bytes, int] = {}  # digest of the normalised question -> number
        self._is_graded, self._asked = bytearray(), array("i")  # by problem; the number of its question, or -1
        self.sources: dict[str, int] = {}
        self.position, self.problem, self.source = array("q"), array("i"), array("i")
        self.length = array("q")  # characters
        self.needs_judge = bytearray()
        self.text, self.numbers = array("Q"), array("Q")
        self.signatures = bytearray()
        self._words, self._ends = array("I"), array("q", [0])  # of the survivors' questions

    def add(self, trace: Trace) -> None:
        position = self.n_traces
        self.n_traces += 1
        question = question_of(trace)
        key = hashlib.blake2b(same_meaning(question).encode(), digest_size=8).digest()
        problem = self.problems.setdefault(key, len(self.problems))
        if problem == len(self._asked):
            self._asked.append(-1)
            self._is_graded.append(False)
        self._is_graded[problem] |= trace.verdict_by == "grader"
        reason = fault_of(trace, self.settings, self.pass_rate)
        if reason is None:
            words = word_hashes(f"{trace.reasoning_content or ''}\n{trace.content}")
            reason = fault_of_text(trace, words, self.settings)
        if reason:
            self.record.take(reason, position)
        else:
            if self._asked[problem] < 0:
                self._asked[problem] = len(self._ends) - 1
                self._words.frombytes(word_hashes(question).tobytes())
                self._ends.append(len(self._words))
            self.position.append(position)
            self.problem.append(self._asked[problem])
            self._keep_numbers(trace, words)

    def _keep_numbers(self, trace: Trace, words: Words) -> None:
        self.source.append(self.sources.setdefault(trace.source, len(self.sources)))
        self.length.append(len(trace.reasoning_content or "") + len(trace.content))
        self.needs_judge.append(self.settings.verified and trace.verdict == "unknown")
        self.text.append(digest(words))
        if self.settings.similarity is not None:
            self.numbers.append(numbers_in(words) ^ digest(word_hashes(trace.answer or "")))
            self.signatures += sign_texts(words).tobytes()

    @cached_property
    def questions(self) -> list[Words]:
        """The words of the survivors' questions, by number."""
        words, ends = np.frombuffer(self._words, np.uint32), self._ends
        return [words[ends[i] : ends[i + 1]] for i in range(len(ends) - 1)]

    @cached_property
    def graded_questions(self) -> npt.NDArray[np.bool_]:
        """Whether a grader judged any trace of a question, for each of `questions`; [Q]."""
        asked = np.frombuffer(self._asked, np.int32)
        graded = np.zeros(len(self._ends) - 1, np.bool_)
        graded[asked[asked >= 0]] = np.frombuffer(self._is_graded, np.bool_)[asked >= 0]
        return graded


class _Decision:
    """Drops traces for what they are to each other. `stays[i]` says whether survivor i still trains; [N]."""

    def __init__(self, survey: _Survey, settings: CurationRecipe, *, record: _Record, seed: int) -> None:
        self.survey, self.settings, self.record, self.seed = survey, settings, record, seed
        self.problem = np.frombuffer(survey.problem, np.int32)
        self.stays = np.ones(len(self.problem), np.bool_)

    def take_unjudged(self) -> None:
        """Without --accept, a vote or a judge counts only for questions that no grader judged."""
        if self.settings.accept is None:
            unjudged = np.frombuffer(self.survey.needs_judge, np.bool_) & self.survey.graded_questions[self.problem]
            self._take("unknown", unjudged)

    def take_contaminated(self, evaluation: list[str]) -> None:
        n = self.settings.contamination_ngram
        if n is None or not evaluation:
            return
        found = contaminated(self.survey.questions, [word_hashes(text) for text in evaluation], n)[self.problem]
        self._take("contaminated", found >= 0, lambda i: evaluation[found[i]])

    def take_same_questions(self) -> None:
        """Of problems with nearly the same question, keep the one whose trace came first."""
        if self.settings.similarity is None:
            return
        asked, firsts = np.unique(self.problem[self.stays], return_index=True)
        by_first = np.argsort(firsts)
        order, firsts = asked[by_first], np.flatnonzero(self.stays)[firsts[by_first]]
        questions = [self.survey.questions[i] for i in order]
        signatures, is_distinctive = sign_questions(questions)
        numbers = np.array([numbers_in(words) for words in questions], np.uint64)
        texts = np.array([digest(words) for words in questions], np.uint64)

        def may_match(i: int, others: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
            is_near = (numbers[others] == numbers[i]) & is_distinctive[others] & is_distinctive[i]
            return self._is_alike(i, others, texts=texts, is_near=is_near)

        repeated = near_duplicates(signatures, self.settings.similarity, may_match)
        like = np.full(len(self.survey.questions), -1, np.int64)
        like[order[repeated >= 0]] = firsts[repeated[repeated >= 0]]
        found = like[self.problem]
        self._take("same_question", found >= 0, lambda i: self._position(found[i]))

    def take_same_traces(self) -> None:
        """Keep the first of nearly the same traces.

        Another problem's trace is not the same with other numbers or another answer, nor if it is short: of 300
        messages that are labelled in a sentence, many have the same sentence, and each teaches what its message is.
        """
        if self.settings.similarity is None:
            return
        index = np.flatnonzero(self.stays)
        signatures = np.frombuffer(self.survey.signatures, np.uint16).reshape(-1, N_HASHES)[index]
        texts = np.frombuffer(self.survey.text, np.uint64)[index]
        numbers = np.frombuffer(self.survey.numbers, np.uint64)[index]
        problem, is_short = self.problem[index], np.frombuffer(self.survey.length, np.int64)[index] < _SHORT

        def may_match(i: int, others: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
            is_own = problem[others] == problem[i]
            alike = self._is_alike(i, others, texts=texts, is_near=(numbers[others] == numbers[i]) | is_own)
            return alike & is_own if is_short[i] else alike

        repeated = near_duplicates(signatures, self.settings.similarity, may_match)
        found = np.full(len(self.stays), -1, np.int64)
        found[index[repeated >= 0]] = index[repeated[repeated >= 0]]
        self._take("same_trace", found >= 0, lambda i: self._position(found[i]))

    def take_over_keep(self) -> None:
        """Keep the shortest traces of a problem, or with a chance of `long_share` the longest instead."""
        keep, share = self.settings.keep, self.settings.long_share
        if keep is None:
            return
        length = np.frombuffer(self.survey.length, np.int64)
        index = np.flatnonzero(self.stays)
        index = index[np.lexsort((length[index], self.problem[index]))]
        starts = np.flatnonzero(np.diff(self.problem[index], prepend=-1))
        over = np.zeros(len(self.stays), np.bool_)
        for group in np.split(index, starts[1:]):
            if len(group) <= keep:
                continue
            left = group.tolist()
            for slot in range(keep):
                takes_long = share and _chance(self.seed, self._question(left[0]), slot) < share
                left.pop(-1 if takes_long else 0)
            over[left] = True
        self._take("over_problem_cap", over)

    def take_over_source(self) -> None:
        """Keep a random part of a source's traces, the same for every order of the file."""
        if self.settings.per_source is None:
            return
        index = np.flatnonzero(self.stays).tolist()
        by_source: dict[int, list[tuple[float, int]]] = {}
        for i in index:
            chance = _chance(self.seed, self.survey.text[i], self._question(i))
            by_source.setdefault(self.survey.source[i], []).append((chance, i))
        over = np.zeros(len(self.stays), np.bool_)
        for drawn in by_source.values():
            over[[i for _, i in sorted(drawn)[self.settings.per_source :]]] = True
        self._take("over_source_cap", over)

    def _is_alike(
        self, i: int, others: npt.NDArray[np.int64], *, texts: npt.NDArray[np.uint64], is_near: npt.NDArray[np.bool_]
    ) -> npt.NDArray[np.bool_]:
        is_copy: npt.NDArray[np.bool_] = texts[others] == texts[i]
        return is_copy if self.settings.similarity == 1 else np.logical_or(is_copy, is_near)

    def _take(self, name: str, taken: npt.NDArray[np.bool_], like: Callable[[int], int | str] = lambda i: "") -> None:
        indices = np.flatnonzero(taken & self.stays)
        if len(indices):
            first = int(indices[0])
            self.record.take(name, self._position(first), like=like(first), count=len(indices))
        self.stays[indices] = False

    def _question(self, i: int) -> int:
        """Return a hash of survivor i's question."""
        return digest(self.survey.questions[self.problem[i]])

    def _position(self, i: int) -> int:
        return self.survey.position[i]


def _chance(*key: int) -> float:
    """Return a number in [0, 1) that depends only on the key."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little") / 2**64


def _at(traces: Iterable[Trace], positions: Sequence[int] | npt.NDArray[np.int64]) -> Iterator[Trace]:
    """Yield the traces at these ascending positions, reading no further than the last."""
    wanted = iter(np.asarray(positions).tolist())
    position = next(wanted, None)
    if position is None:
        return
    for i, trace in enumerate(traces):
        if i == position:
            yield trace
            position = next(wanted, None)
            if position is None:
                return


def apart_from(
    problems: list[Problem], held_out: list[Problem], *, filters: CurationRecipe, report: Reporter = SILENT
) -> list[Problem]:
    """Return the problems that contain no held-out question; the filter `contaminated` drops traces of the others."""
    n = filters.contamination_ngram
    if n is None or not held_out or not problems:
        return problems
    asked, evaluation = ([word_hashes(problem.question) for problem in part] for part in (problems, held_out))
    apart = [problem for problem, found in zip(problems, contaminated(asked, evaluation, n), strict=True) if found < 0]
    if len(apart) < len(problems):
        report.say(f"{len(problems) - len(apart)} problems contain a held-out question and are left out")
    return apart
