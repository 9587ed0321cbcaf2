"""Which traces train, and what each filter took: verified, whole, unlike each other, not too many of a kind.

The traces are read twice. The first pass judges each trace by itself and keeps a few numbers of those that are left
(about 200 bytes, a MinHash signature among them); duplicates, evaluation questions and the caps are decided on these.
The second pass yields what stays. So a million traces need no more memory than their numbers.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import UsageError
from .evaluate import repeats
from .similar import (
    N_HASHES,
    Words,
    contaminated,
    digest,
    near_duplicates,
    numbers_in,
    repeated_share,
    sign_questions,
    sign_texts,
    word_hashes,
)
from .split import bucket_of, normalise_question
from .traces import Trace

FILTERS = {
    "held_out": "the question is not in the training bucket of the split",
    "wrong": "the grader says the answer is wrong",
    "unknown": "no grader could judge the answer, and no vote or judge that counts favours it",
    "cut_off": "the teacher reached its limit, or failed, before it ended",
    "looped": "the trace goes in circles, or says most things more than once",
    "no_answer": "the trace ends in its thinking: there is no answer",
    "no_reasoning": "the trace holds no reasoning to learn from",
    "stray_tags": "think tags are left in the text: where the thinking ends is uncertain",
    "too_short": "fewer tokens than --min-tokens",
    "overlong": "more tokens than --max-trace-tokens",
    "too_easy": "the untrained student solves the problem more often than --max-pass-rate",
    "too_hard": "the untrained student solves the problem less often than --min-pass-rate",
    "contaminated": "the question stands in the evaluation, or shares words in a row with a question that does",
    "same_question": "another problem asks nearly the same",
    "same_trace": "another trace says nearly the same",
    "over_problem_cap": "enough other traces of the problem are kept",
    "over_source_cap": "enough traces of the source are kept",
    "too_long": "more tokens of the student than --max-length",
}
"""Every filter in the order in which they are asked; a trace counts for the first that takes it. `too_long` is counted
where the rows are made, once the student's tokenizer is there."""

LONG_SHARE_SMALL = 0.2
"""`long_share` for students under 3 B parameters, who learn less from long chains than from short ones, and most from a
mix. Source: Li et al., Small models struggle to learn from strong reasoners, arXiv 2502.12143; the share is ours."""

_N_EXCERPT = 100  # characters
_TAIL = 1536  # words in which a loop of up to 512 shows


@dataclass(frozen=True)
class CurateSettings:
    """Which filters are on. None or False switches one off."""

    accept: Collection[str] | None = None
    """What may stand for a grader: `vote`, `judge`. None: both, for problems of which no grader judged any trace."""
    train_bucket: bool = True
    verified: bool = True
    """Off: wrong and unknown answers train as well, to measure what verification is worth."""
    whole: bool = True
    """Neither cut off nor failed; there is an answer after the thinking, and no tag in either."""
    reasoning: bool = True
    min_tokens: int | None = None
    max_trace_tokens: int | None = None
    max_repeated: float | None = 0.5
    """Share of a trace's 8-grams that stood in it before; a loop at its end is one too many at any share."""
    min_pass_rate: float | None = None
    max_pass_rate: float | None = 0.99
    contamination_ngram: int | None = 8
    """Words in a row that a question may not share with an evaluation question."""
    similarity: float | None = 0.8
    """Jaccard similarity of three-word shingles from which questions, and traces, count as the same; 1: only copies."""
    keep: int | None = 1
    """Traces of a problem, the shortest first."""
    long_share: float = 0.0
    """Share of the kept traces for which the longest of what a problem has is taken instead."""
    per_source: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if unknown := set(self.accept or ()) - {"vote", "judge"}:
            raise UsageError(f"{', '.join(sorted(unknown))} cannot make a trace train", "--accept takes vote and judge")
        for name in ("min_pass_rate", "max_pass_rate", "max_repeated", "similarity", "long_share"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise UsageError(f"--{name.replace('_', '-')} is a share between 0 and 1, not {value}")
        for name in ("keep", "per_source", "contamination_ngram"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name.replace('_', '-')} must be at least 1")

    def to_json(self) -> dict[str, Any]:
        """Return the settings as JSON has them."""
        return asdict(self) | {"accept": None if self.accept is None else sorted(self.accept)}


@dataclass(frozen=True)
class Selection:
    """What stays: iterating reads the traces again and yields them in order. `record` is for curation.json."""

    source: Callable[[], Iterable[Trace]]
    positions: npt.NDArray[np.int64]  # in the source, ascending
    record: dict[str, Any]

    def __len__(self) -> int:
        return len(self.positions)

    def __iter__(self) -> Iterator[Trace]:
        return _at(self.source(), self.positions)


def curate(
    traces: Iterable[Trace] | Callable[[], Iterable[Trace]],
    settings: CurateSettings | None = None,
    *,
    evaluation: Iterable[str] = (),
    pass_rate: Mapping[str, float] | None = None,
) -> tuple[list[Trace], dict[str, Any]]:
    """Return the traces to train on and the record for curation.json; `select` does it without holding them."""
    if not callable(traces):
        held = list(traces)
        selection = select(lambda: held, settings, evaluation=evaluation, pass_rate=pass_rate)
    else:
        selection = select(traces, settings, evaluation=evaluation, pass_rate=pass_rate)
    return list(selection), selection.record


def select(
    source: Callable[[], Iterable[Trace]],
    settings: CurateSettings | None = None,
    *,
    evaluation: Iterable[str] = (),
    pass_rate: Mapping[str, float] | None = None,
) -> Selection:
    """Decide which of the traces that `source()` gives, the same at every call, train.

    `evaluation` holds the questions that the student will be scored on, `pass_rate` how often the untrained student
    solves a problem, by its id; a problem that is not in it counts as neither easy nor hard.
    """
    settings = settings or CurateSettings()
    record = _Record(settings)
    survey = _Survey(settings, pass_rate or {}, record)
    for trace in source():
        survey.add(trace)
    decision = _Decision(survey, settings, record)
    decision.take_unjudged()
    decision.take_contaminated(list(evaluation))
    decision.take_same_questions()
    decision.take_same_traces()
    decision.take_over_keep()
    decision.take_over_source()
    positions = np.frombuffer(survey.position, np.int64)[decision.stays]
    return Selection(source, positions, record.finish(source, survey, len(positions)))


def question_of(trace: Trace) -> str:
    """Return what was asked: the user's turns."""
    return "\n".join(_user_turns(trace))


def _user_turns(trace: Trace) -> list[str]:
    turns = (turn["content"] or "" for turn in trace.messages if turn["role"] == "user")
    return [turn.encode("utf-8", "replace").decode() for turn in turns]  # half a surrogate pair cannot be hashed


class _Record:
    """Counts what each filter takes and keeps where its first example stands."""

    def __init__(self, settings: CurateSettings) -> None:
        self.settings = settings
        self.dropped: Counter[str] = Counter()
        self.first: dict[str, tuple[int, int | str]] = {}  # position; what it is like

    def take(self, name: str, position: int, like: int | str = "", count: int = 1) -> None:
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
                example["like_excerpt"] = shorten(like)
            examples[name] = example
        names = [name for name in FILTERS if self.dropped[name]]
        return {
            "traces": survey.n_traces,
            "problems": len(survey.problems),
            "kept": n_kept,
            "dropped": {name: self.dropped[name] for name in names},
            "why": FILTERS,
            "examples": {name: examples[name] for name in names},
            "settings": self.settings.to_json(),
        }


class _Survey:
    """The first pass: traces that no filter takes by themselves, as a few numbers each."""

    def __init__(self, settings: CurateSettings, pass_rate: Mapping[str, float], record: _Record) -> None:
        self.settings, self.pass_rate, self.record = settings, pass_rate, record
        self.n_traces = 0
        self.problems: dict[bytes, int] = {}  # digest of the normalised question -> number
        self.graded: set[int] = set()
        self.sources: dict[str, int] = {}
        self.position, self.problem, self.source = array("q"), array("i"), array("i")
        self.length = array("q")  # characters
        self.needs_judge = bytearray()
        self.text, self.numbers = array("Q"), array("Q")
        self.signatures = bytearray()
        self._words, self._ends = array("I"), array("q", [0])  # of the questions that survivors ask
        self._asked: dict[int, int] = {}

    def add(self, trace: Trace) -> None:
        position = self.n_traces
        self.n_traces += 1
        question = question_of(trace)
        key = hashlib.blake2b(normalise_question(question).encode(), digest_size=8).digest()
        problem = self.problems.setdefault(key, len(self.problems))
        if trace.verdict_by == "grader":
            self.graded.add(problem)
        text = f"{trace.reasoning_content or ''}\n{trace.content}"
        reason = self._fault(trace)
        words = word_hashes(text) if reason is None else None
        if words is not None:
            reason = self._fault_of_text(trace, words, text)
        if reason or words is None:
            self.record.take(reason or "", position)
            return
        if problem not in self._asked:
            self._asked[problem] = len(self._asked)
            self._words.frombytes(word_hashes(question).tobytes())
            self._ends.append(len(self._words))
        self.position.append(position)
        self.problem.append(self._asked[problem])
        self.source.append(self.sources.setdefault(trace.source, len(self.sources)))
        self.length.append(len(trace.reasoning_content or "") + len(trace.content))
        self.needs_judge.append(self.settings.verified and trace.verdict == "unknown")
        self.text.append(digest(words))
        if self.settings.similarity is not None:
            self.numbers.append(numbers_in(words))
            self.signatures += sign_texts(words).tobytes()

    @cached_property
    def questions(self) -> list[Words]:
        """The words of each question that a survivor asks, by its number."""
        words, ends = np.frombuffer(self._words, np.uint32), self._ends
        return [words[ends[i] : ends[i + 1]] for i in range(len(ends) - 1)]

    @cached_property
    def graded_questions(self) -> npt.NDArray[np.bool_]:
        """Whether a grader judged any trace of it, for each of `questions`."""
        return np.array([problem in self.graded for problem in self._asked], np.bool_)

    def _fault(self, trace: Trace) -> str | None:
        """Return the filter that takes a trace whatever its text says, or None."""
        settings = self.settings
        if settings.train_bucket and bucket_of(next(iter(_user_turns(trace)), "")) != "train":
            return "held_out"
        if settings.verified and trace.verdict == "wrong":
            return "wrong"
        favours = ("vote", "judge") if settings.accept is None else settings.accept
        if settings.verified and trace.verdict == "unknown" and trace.verdict_by not in favours:
            return "unknown"
        if settings.whole and trace.finish_reason in ("length", "error"):
            return "cut_off"
        if settings.max_repeated is not None and trace.finish_reason == "loop":
            return "looped"
        if settings.whole and not trace.content.strip():
            return "no_answer"
        if settings.reasoning and not (trace.reasoning_content or "").strip():
            return "no_reasoning"
        rate = self.pass_rate.get(trace.problem_id)
        if rate is not None and settings.max_pass_rate is not None and rate > settings.max_pass_rate:
            return "too_easy"
        if rate is not None and settings.min_pass_rate is not None and rate < settings.min_pass_rate:
            return "too_hard"
        return None

    def _fault_of_text(self, trace: Trace, words: Words, text: str) -> str | None:
        settings = self.settings
        if settings.whole and ("<think>" in text or "</think>" in text):
            return "stray_tags"
        n_tokens = trace.usage.completion or len(words)
        if settings.min_tokens is not None and n_tokens < settings.min_tokens:
            return "too_short"
        if settings.max_trace_tokens is not None and n_tokens > settings.max_trace_tokens:
            return "overlong"
        if settings.max_repeated is not None and (
            repeated_share(words) > settings.max_repeated or repeats(words[-_TAIL:].tolist())
        ):
            return "looped"
        return None


class _Decision:
    """What the traces are to each other. `stays[i]` is whether survivor i is still in."""

    def __init__(self, survey: _Survey, settings: CurateSettings, record: _Record) -> None:
        self.survey, self.settings, self.record = survey, settings, record
        self.problem = np.frombuffer(survey.problem, np.int32)
        self.stays = np.ones(len(self.problem), np.bool_)

    def take_unjudged(self) -> None:
        """Without --accept, a vote or a judge counts only where no grader judged."""
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
        """Of problems that ask nearly the same, the one whose trace came first stays."""
        if self.settings.similarity is None:
            return
        asked, firsts = np.unique(self.problem[self.stays], return_index=True)
        order = asked[np.argsort(firsts)].tolist()  # by first trace
        questions = [self.survey.questions[i] for i in order]
        signatures, has_own = sign_questions(questions)
        numbers = np.array([numbers_in(words) for words in questions], np.uint64)
        texts = np.array([digest(words) for words in questions], np.uint64)

        def may_match(i: int, others: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
            return self._is_alike(i, others, texts, (numbers[others] == numbers[i]) & has_own[others] & has_own[i])

        repeated = near_duplicates(signatures, self.settings.similarity, may_match)
        like = np.full(len(self.survey.questions), -1, np.int64)
        for i in np.flatnonzero(repeated >= 0):
            like[order[i]] = np.flatnonzero((self.problem == order[repeated[i]]) & self.stays)[0]
        found = like[self.problem]
        self._take("same_question", found >= 0, lambda i: self._position(found[i]))

    def take_same_traces(self) -> None:
        """Traces of different problems with different numbers are different, however alike their words."""
        if self.settings.similarity is None:
            return
        index = np.flatnonzero(self.stays)
        signatures = np.frombuffer(self.survey.signatures, np.uint16).reshape(-1, N_HASHES)[index]
        texts = np.frombuffer(self.survey.text, np.uint64)[index]
        numbers = np.frombuffer(self.survey.numbers, np.uint64)[index]
        problem = self.problem[index]

        def may_match(i: int, others: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
            is_near = (numbers[others] == numbers[i]) | (problem[others] == problem[i])
            return self._is_alike(i, others, texts, is_near)

        repeated = near_duplicates(signatures, self.settings.similarity, may_match)
        found = np.full(len(self.stays), -1, np.int64)
        found[index[repeated >= 0]] = index[repeated[repeated >= 0]]
        self._take("same_trace", found >= 0, lambda i: self._position(found[i]))

    def take_over_keep(self) -> None:
        """Keep the shortest traces of a problem, and as often as `long_share` says the longest instead."""
        keep, share = self.settings.keep, self.settings.long_share
        if keep is None:
            return
        length = np.frombuffer(self.survey.length, np.int64)
        index = np.flatnonzero(self.stays)
        index = index[np.lexsort((length[index], self.problem[index]))]
        starts = np.flatnonzero(np.diff(self.problem[index], prepend=-1))
        over = np.zeros(len(self.stays), np.bool_)
        for group in np.split(index, starts[1:]):
            left = group.tolist()
            for slot in range(min(keep, len(left))):
                question = digest(self.survey.questions[self.problem[left[0]]])
                left.pop(-1 if share and _chance(self.settings.seed, question, slot) < share else 0)
                if not left:
                    break
            over[left] = True
        self._take("over_problem_cap", over)

    def take_over_source(self) -> None:
        """Keep a random part of what a source has too much of, the same at every order of the file."""
        if self.settings.per_source is None:
            return
        index = np.flatnonzero(self.stays).tolist()
        by_source: dict[int, list[tuple[float, int]]] = {}
        for i in index:
            chance = _chance(self.settings.seed, self.survey.text[i], digest(self.survey.questions[self.problem[i]]))
            by_source.setdefault(self.survey.source[i], []).append((chance, i))
        over = np.zeros(len(self.stays), np.bool_)
        for drawn in by_source.values():
            over[[i for _, i in sorted(drawn)[self.settings.per_source :]]] = True
        self._take("over_source_cap", over)

    def _is_alike(
        self, i: int, others: npt.NDArray[np.int64], texts: npt.NDArray[np.uint64], is_near: npt.NDArray[np.bool_]
    ) -> npt.NDArray[np.bool_]:
        is_copy: npt.NDArray[np.bool_] = texts[others] == texts[i]
        return is_copy if self.settings.similarity == 1 else np.logical_or(is_copy, is_near)

    def _take(self, name: str, taken: npt.NDArray[np.bool_], like: Callable[[int], int | str] = lambda i: "") -> None:
        indices = np.flatnonzero(taken & self.stays)
        if len(indices):
            first = int(indices[0])
            self.record.take(name, self._position(first), like(first), len(indices))
        self.stays[indices] = False

    def _position(self, i: int) -> int:
        return self.survey.position[i]


def excerpt(trace: Trace) -> str:
    """Return one line that tells which trace this is: the question, and how it ends."""
    return f"{shorten(question_of(trace))} → {shorten(trace.content, 60)}"


def shorten(text: str, n: int = _N_EXCERPT) -> str:
    """Return the text on one line, cut to n characters; what a terminal would obey is left out."""
    line = "".join(c if c.isprintable() else "�" for c in " ".join(text[: 4 * n].split()))
    return line if len(line) <= n else line[: n - 1] + "…"


def _chance(*key: int) -> float:
    """Return a number in [0, 1) that depends on the key alone."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little") / 2**64


def _at(traces: Iterable[Trace], positions: Sequence[int] | npt.NDArray[np.int64]) -> Iterator[Trace]:
    """Yield the traces at these positions, which ascend; read no further than the last."""
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
