"""A vote for problems without an answer: the samples of a problem elect the answer that most of them give.

A sample that was cut off (by its limit or a loop) or that has no answer does not vote, but it counts as a sample: an
answer of three out of eight samples has a share of 3/8, whatever the other five say. A vote is not a proof: it makes no
trace `right`, it only says that samples agree.

Source: self-consistency, Wang et al., arXiv 2203.11171; the minimum share and number of votes are ours.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from fractions import Fraction

from ..graders.answer import clean
from ..graders.latex import plain
from ..graders.quantity import parse
from ..recipe.gathering import VoteRecipe
from ..records import Judgement, Trace

Same = Callable[[str, str], bool]
"""Says whether two differently written answers mean the same, as a grader does."""

_BOXED = re.compile(r"\\f?boxed\{([^{}]*)\}")


def vote(
    answers: Mapping[str, str | None], settings: VoteRecipe | None = None, same: Same | None = None
) -> list[Judgement]:
    """Judge the samples of one problem by their ids: `vote` for those that gave the elected answer, `none` for others.

    The answer is None for a sample that was cut off or has none. A judgement's agreement is the share of all samples
    that gave the same answer. Answers are the same if they are written alike (up to case, white space, Markdown and
    LaTeX markup), are the same number, or `same` says so. The order of the samples does not matter.
    """
    settings = settings or VoteRecipe()
    given = {id_: answer for id_, answer in answers.items() if answer is not None}
    groups = sorted(_group(given, same), key=len, reverse=True)
    agreement = {id_: len(group) / len(answers) for group in groups for id_ in group}
    most, second = [*map(len, groups), 0, 0][:2]
    is_elected = most > second and most >= settings.min_votes and most / len(answers) >= settings.min_share - 1e-9
    elected = groups[0] if is_elected else []
    return [Judgement(id_, "vote" if id_ in elected else "none", agreement.get(id_)) for id_ in answers]


def vote_on_traces(
    traces: Iterable[Trace], settings: VoteRecipe | None = None, same: Same | None = None
) -> Iterator[Judgement]:
    """Yield a judgement of every trace that no grader judged.

    The traces of a problem are its samples, in any order; one that did not end by itself does not vote.
    """
    problems: dict[str, dict[str, str | None]] = {}
    for trace in traces:
        if trace.verdict == "unknown":
            answer = trace.answer if trace.finish_reason == "stop" and (trace.answer or "").strip() else None
            problems.setdefault(trace.problem_id, {})[trace.id] = answer
    for answers in problems.values():
        yield from vote(answers, settings, same)


def answer_key(answer: str) -> str | Fraction:
    """Return the number or the plain text of an answer, the same for `1,000`, `1000.0` and `$1000$`."""
    text = clean(plain(_BOXED.sub(r"\1", answer)))
    number = parse(text)
    return number.value if number and not number.unit else " ".join(text.casefold().split()).rstrip("!")


def _group(answers: Mapping[str, str], same: Same | None) -> list[list[str]]:
    """Group the ids whose answers are the same: by their keys first, then keys that `same` joins."""
    by_key: dict[str | Fraction, list[str]] = {}
    for id_, answer in sorted(answers.items(), key=lambda one: (one[1], one[0])):
        by_key.setdefault(answer_key(answer), []).append(id_)
    if same is None:
        return list(by_key.values())
    groups: list[list[str]] = []
    for ids in by_key.values():
        group = next((group for group in groups if same(answers[group[0]], answers[ids[0]])), None)
        if group is None:
            groups.append(ids)
        else:
            group += ids
    return groups
