"""One label of a known set, as people and models name it: "bug", "Label: bug", "This is not a feature but a **bug**.".

The problem's metadata has the set under `choices`. A reference that names several labels ("ui, docs") asks for exactly
these, in any order. A label that is only named to be rejected does not count, and where labels begin alike the longest
that stands there does.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from .answer import clean, marked_answer, standing
from .base import CannotTell, Submission

_DENIED = re.compile(
    r"(?:(?:\bnot|n['’]t|\bnever|\bneither|\bnor|\brather than|\binstead of|\bother than|\bunlike"
    r"|\b(?:any|every)thing but)\b"
    r"(?!\s+(?:only|just|merely|simply)\b)(?:\s+[\w'’]+){0,3}|\bno)[^\w.;:!?\n]*$",
    re.IGNORECASE,
)
_DENIED_AFTER = re.compile(
    r"[\"'`*)\s]*(?:label|category|class|option)?\s*(?:(?:is|are|was|do|does|can|could|would|should)(?:n['’]t|\s+not\b)"
    r"|(?:is|are|was|seems)\s+(?:\w+\s+)?(?:wrong|incorrect|ruled out|less))",
    re.IGNORECASE,
)
_LISTED = re.compile(
    r"[\s\"'`*]*(?:,|/|\||&|\band\b|\bor\b|\bnor\b)[\s\"'`*]*(?:(?:and|or|nor|an?|the)\s+)*[\"'`*]*", re.IGNORECASE
)
_NAMED = re.compile(r"[\W_]*([A-Za-z][\w' ]{0,40}?)[\"*_` ]*(?::|=>|->|=|→|⇒)[\W_]*$")
_STATED = re.compile(
    r"(?:(?<!which )(?<!that )\b(?:is|be|as|are|was|choose|pick|select|say|therefore|so|thus|hence|go with)|'s|[:=→⇒]"
    r"|->|=>)[\W_]*"
    r"(?:(?:an?|the|clearly|probably|likely|most|definitely|best|rather|instead|about|classified|labell?ed|as)\s+)*[\W_]*$",
    re.IGNORECASE,
)
_SENTENCE = re.compile(r"\n|(?<=[.!?])[ \t]+(?=[A-Z])")
_REASON = re.compile(r"\b(?:reason|explanation|note|because|rationale|why)", re.IGNORECASE)
_UNSURE = re.compile(r"\b(?:might|could|may|maybe|perhaps|either|whether)\b", re.IGNORECASE)
_BRIEF = 12  # words
_NEAR = 200  # characters before a label that say how it is meant
_COMMON = frozenset(["a", "i", "in", "it", "no", "none", "not", "off", "on", "or", "other", "out", "to", "up", "us"])
"""Labels that are everyday words: in prose they say nothing."""


@dataclass(frozen=True)
class _Mention:
    """A place where a label stands: whether it is denied there, stated, and the first or the only word of its sentence.

    `named` is what the sentence calls it before a colon or an arrow ("label", "category"), if it does; `brief` says
    that the sentence is short, so that the label is no word among many.
    """

    label: str
    sentence: int
    denied: bool
    stated: bool
    named: str
    opens: bool
    alone: bool
    brief: bool


def grade(submission: Submission) -> float:
    """Return 1.0 if the content chooses the reference's label or labels and no other, else 0.0.

    Raises:
        CannotTell: there is no set, the reference is not in it, or the content names labels without choosing.
    """
    known = names_of(submission.metadata.get("choices"))
    reference = submission.reference()
    gold = {label for label in split(reference) if label in known} if key(reference) not in known else {key(reference)}
    if not gold:
        raise CannotTell(f"the reference {reference[:40]!r} is not among the labels")
    several = bool(submission.metadata.get("several"))
    try:
        chosen = set(choose(submission.content, known, several=several))
    except _OnlyDenied as denied:
        if gold & denied.labels:
            return 0.0
        raise
    return 1.0 if chosen == gold else 0.0


def chosen(content: str, metadata: dict[str, Any]) -> list[str]:
    """Return the labels that a content chooses, as the set of the problem's metadata writes them.

    Raises:
        CannotTell: see `choose`.
    """
    known = names_of(metadata.get("choices"))
    return [known[one] for one in choose(content, known, several=bool(metadata.get("several")))]


class _OnlyDenied(CannotTell):
    def __init__(self, labels: set[str]) -> None:
        super().__init__("the answer only says what it is not")
        self.labels = labels


def names_of(choices: object) -> dict[str, str]:
    """Return the labels of a set by their keys.

    Raises:
        CannotTell: the problem has no list of labels.
    """
    if not isinstance(choices, list) or not choices:
        raise CannotTell("the problem has no set of labels")
    return {key(str(name)): str(name) for name in choices}


def key(label: str) -> str:
    """Return a label in the form that is compared: without case, `_` and `-` as spaces."""
    return " ".join(re.sub(r"[\s_\-–]+", " ", clean(label).casefold()).split())


def split(reference: str) -> list[str]:
    """Return the keys of the labels that a reference lists."""
    return [key(part) for part in re.split(r"[,;|]", reference) if part.strip()]


def choose(content: str, known: dict[str, str], *, several: bool = False) -> list[str]:
    """Return the keys of the labels that a content chooses; none if it names none.

    Raises:
        CannotTell: it names several without choosing, or only says what it is not.
    """
    content = re.sub(r"(?<!\w)_+|_+(?!\w)", " ", standing(content))
    if key(re.sub(r"```\w*", "", content)) in known:
        return [key(re.sub(r"```\w*", "", content))]
    marked, everywhere = marked_answer(content, whole_line=True), _mentions(content, known)
    found = (_mentions(marked, known) if marked else []) or everywhere
    taken = [one for one in found if not one.denied]
    if not taken and found:
        raise _OnlyDenied({one.label for one in found})
    if several:
        return _listed(taken)
    said = {(one.named, one.label) for one in everywhere if one.named and not one.denied}
    if len({name for name, _ in said}) < len(said):  # "Label: bug" and "Label: feature"
        raise CannotTell("the answer names several labels without choosing one")
    return _one(taken)


def _listed(taken: list[_Mention]) -> list[str]:
    """Return the labels of the last line that has some, and of those before it that are nothing but a label."""
    lines = {one.sentence for one in taken}
    last = max(lines, default=0)
    while last - 1 in lines and all(one.alone for one in taken if one.sentence in (last - 1, last)):
        last -= 1
    return list(dict.fromkeys(one.label for one in taken if one.sentence >= last))


def _one(taken: list[_Mention]) -> list[str]:
    """Return the label that the most telling mentions agree on."""
    alone = {one.label for one in taken if one.alone}
    if len(alone) > 1 and not taken[-1].alone:
        taken = [one for one in taken if not one.alone]  # the set, listed before the answer
    last = max((one.sentence for one in taken), default=0)
    opening = {one.label for one in taken if one.opens}
    concluded = {one.label for one in taken if one.stated and one.sentence == last}
    telling = (
        {one.label for one in taken if one.alone or one.named},
        opening | concluded if len(opening) == 1 else set(),
        concluded,
        {one.label for one in taken if one.stated},
        opening,
        {one.label for one in taken if one.brief and one.label not in _COMMON},
    )
    labels = next((labels for labels in telling if labels), set())
    if len(labels) > 1:
        raise CannotTell("the answer names several labels without choosing one")
    if not labels and any(one.label not in _COMMON for one in taken):
        raise CannotTell("the answer mentions a label without choosing it")
    return list(labels)


def _mentions(text: str, known: dict[str, str]) -> list[_Mention]:
    """Return where labels stand in a text, in their order."""
    pattern, found = _pattern(known.values()), list[_Mention]()
    for number, line in enumerate(_SENTENCE.split(text)):
        places = [(match.start(), match.end(), key(match[0])) for match in pattern.finditer(line)]
        joined = [bool(_LISTED.fullmatch(line[a[1] : b[0]])) for a, b in pairwise(places)]
        denied = False
        for i, (start, end, label) in enumerate(places):
            before, is_listed = line[max(0, start - _NEAR) : start], bool(i and joined[i - 1])
            clause = re.split(r"[,.;:!?](?=\s)", before)[-1]
            denied = (denied and is_listed) or bool(
                _DENIED.search(clause) or _DENIED_AFTER.match(line[end : end + _NEAR])
            )
            in_list = is_listed or (i < len(joined) and joined[i])
            is_sure = not in_list and not _UNSURE.search(clause)
            name = _NAMED.fullmatch(before)
            is_said = label not in _COMMON or not re.match(r"[\s\"'*`]*\w", line[end:])  # "there is no way"
            bare = start < _NEAR and not before.strip(" \t*-•`\"'#>([{.0123456789")
            found.append(
                _Mention(
                    label,
                    number,
                    denied,
                    stated=is_sure and is_said and _STATED.search(before) is not None,
                    named=name[1].casefold() if is_sure and name and not _REASON.search(name[1]) else "",
                    opens=is_sure and bare and re.match(r"[\"'`*)]*\s*(?:[.,:;!–—(-]|$)", line[end:]) is not None,
                    alone=bare and not re.search(r"\w", line[end:]),
                    brief=len(line.split()) <= _BRIEF,
                )
            )
    return found


def _pattern(names: Iterable[str]) -> re.Pattern[str]:
    """Return what finds the labels of a set, of those that begin alike the longest."""
    forms = []
    for name in sorted(names, key=len, reverse=True):
        words = r"[\s_\-–]+".join(map(re.escape, re.split(r"[\s_\-–]+", name.strip())))
        forms.append(f"(?-i:{words})" if re.fullmatch(r"[A-Z]{1,3}", name) else words)  # "it" is not IT
    return re.compile(rf"(?<![\w+#-])(?:{'|'.join(forms)})(?![\w+#]|[-.'’]\w)", re.IGNORECASE)
