"""A vote for problems without an answer: the samples of a problem elect the answer that most of them give.

A sample that was cut off (by its limit or a loop) or that has no answer does not vote, but it counts as a sample: an
answer of three out of eight samples has a share of 3/8, whatever the other five say. A vote is not a proof: it makes no
trace `right`, it only says that samples agree.

Source: self-consistency, Wang et al., arXiv 2203.11171; the minimum share and number of votes are ours.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

from ..graders.number import parse
from ..recipe.gathering import VoteRecipe
from ..records import Judgement, Trace

Same = Callable[[str, str], bool]
"""Says whether two differently written answers mean the same, as a grader does."""

_WRAPPED = re.compile(r"\\(?:boxed|text|mathrm|textbf)\{([^{}]*)\}")


@dataclass(frozen=True)
class Ballot:
    """One sample's vote; `answer` is None if the sample was cut off or has no answer."""

    id: str
    answer: str | None


@dataclass(frozen=True)
class Election:
    """The outcome of one problem: the accepted answer, the ids that gave it, and by id the share that agrees with it.

    `agreement` is None for a sample without an answer.
    """

    accepted: str | None
    favoured: frozenset[str]
    agreement: dict[str, float | None]


def vote(ballots: Sequence[Ballot], settings: VoteRecipe | None = None, same: Same | None = None) -> Election:
    """Return the outcome of a vote.

    Answers are the same if they are written alike (up to case, white space, Markdown and LaTeX markup), are the same
    number, or `same` says so. The order of the ballots does not matter. `accepted` is the winners' shortest wording.
    """
    settings = settings or VoteRecipe()
    groups = _group([ballot for ballot in ballots if ballot.answer is not None], same)
    agreement: dict[str, float | None] = {ballot.id: None for ballot in ballots}
    for group in groups:
        agreement |= dict.fromkeys((ballot.id for ballot in group), len(group) / len(ballots))
    sizes = sorted(map(len, groups), reverse=True)
    is_tied = len(sizes) > 1 and sizes[0] == sizes[1]
    if not sizes or is_tied or sizes[0] < settings.min_votes or sizes[0] / len(ballots) < settings.min_share - 1e-9:
        return Election(None, frozenset(), agreement)
    winners = max(groups, key=len)
    wordings = sorted((ballot.answer or "" for ballot in winners), key=lambda answer: (len(answer), answer))
    return Election(wordings[0], frozenset(ballot.id for ballot in winners), agreement)


def vote_on_traces(
    traces: Iterable[Trace], settings: VoteRecipe | None = None, same: Same | None = None
) -> Iterator[Judgement]:
    """Yield a judgement of every trace that no grader judged: `vote` for the winners, `none` for the others.

    The traces of a problem are its samples, in any order; one that did not end by itself does not vote.
    """
    problems: dict[str, list[Ballot]] = {}
    for trace in traces:
        if trace.verdict == "unknown":
            answer = trace.answer if trace.finish_reason == "stop" and (trace.answer or "").strip() else None
            problems.setdefault(trace.problem_id, []).append(Ballot(trace.id, answer))
    for ballots in problems.values():
        election = vote(ballots, settings, same)
        for ballot in ballots:
            by = election.agreement[ballot.id]
            yield Judgement(ballot.id, "vote" if ballot.id in election.favoured else "none", by)


def answer_key(answer: str) -> str | Fraction:
    """Return the number or the plain text of an answer, the same for `1,000`, `1000.0` and `$1000$`."""
    text = unicodedata.normalize("NFKC", answer).replace("−", "-").replace("–", "-")
    while (plain := _without_markup(text)) != text:
        text = plain
    number, unit = parse(text) or (None, "")
    return text if number is None or unit else number


def _without_markup(text: str) -> str:
    text = _WRAPPED.sub(r"\1", text)
    for mark in ("\\left", "\\right", "\\,", "\\!", "\\;", "\\(", "\\)", "\\[", "\\]"):
        text = text.replace(mark, "")
    text = " ".join(text.casefold().split()).strip("*_`\"'“”‘’$ ")
    return text[:-1] if text.endswith((".", "!")) and not text.endswith("..") else text


def _group(ballots: Sequence[Ballot], same: Same | None) -> list[list[Ballot]]:
    """Group the ballots whose answers are the same: by their keys first, then keys that `same` joins."""
    by_key: dict[str | Fraction, list[Ballot]] = {}
    for ballot in sorted(ballots, key=lambda ballot: (ballot.answer or "", ballot.id)):
        by_key.setdefault(answer_key(ballot.answer or ""), []).append(ballot)
    if same is None:
        return list(by_key.values())
    groups: list[list[Ballot]] = []
    for members in by_key.values():
        answer = members[0].answer or ""
        group = next((group for group in groups if same(group[0].answer or "", answer)), None)
        if group is None:
            groups.append(members)
        else:
            group += members
    return groups
