"""Find the final answer in a model's content, never in its thinking: one module for every caller."""

from __future__ import annotations

import json
import re
from fractions import Fraction

from .latex import plain
from .quantity import hedges, parse, quantities
from .units import measured

_BOX = re.compile(r"\\f?boxed\s*\{")
_UNIT_BEHIND = re.compile(r"\s*\$*\s*(?!in\b)([A-Za-zµ]{2,}(?:[/^·]\w+)*|%|°[CF]?)(?![\w])")
_STATED = re.compile(
    r"\banswers?\b(?:\s+(?:to|of|for)\s[^\n.=:]{1,60}?)?(?:,[^\n.,=:]{1,40},)?[*_`\"'’s]*\s*"
    r"(?:(?:is|are|was|must be|should be|would be|will be|=|:)[*_`\s]*)+",
    re.IGNORECASE,
)
_RETRACTION = re.compile(
    r"\b(?:no,? wait|wait,|wait[.—-]|wait no|hold on|scratch that|correction\b|on second thought"
    r"|let me (?:redo|reconsider)|i (?:made|have made) (?:a|an) (?:mistake|error)|i was wrong"
    r"|th(?:at|is)(?:'s| is| was) (?:wrong|not right|incorrect)|actually, )",
    re.IGNORECASE,
)
_CONFIRMED = re.compile(
    r"(?<!not )(?<!n't )(?<!n’t )\b(?:correct|confirms?|confirmed|yes|checks out|still)\b", re.IGNORECASE
)
_REFUSAL = re.compile(
    r"(?:i(?:'m| am) (?:very |so |really )?sorry|sorry|i apologi[sz]e|unfortunately|as an ai\b[^.]{0,40}|i(?:'m| am)"
    r" afraid)?"
    r"[\s,.:—-]*(?:but )?(?:that )?i (?:can(?:no|')t|can not|am (?:not able|unable)|'?m (?:not able|unable)|won't|"
    r"will not|must decline|do not feel comfortable)\b(?:[^.\n]{0,40})"
    r"\b(?:help|assist|answer|comply|provide|do (?:that|this)|fulfil|discuss|continue|solve|share|support|give"
    r"|advise|offer|engage|recommend|talk)",
    re.IGNORECASE,
)
_LABEL = re.compile(r"[^\w\n]*(?P<name>[A-Z][A-Za-z ']{1,40})[*_ ]*:[*_ ]+(?P<value>\S.{0,200})")
_NO_RESULT = re.compile(
    r"\b(?:note|check|explanation|step|verification|proof|hint|remark|question|problem|reason|because|given|therefore|so|"
    r"thus|hence|confidence|next|not|others?)\b",
    re.IGNORECASE,
)
_WHOLE_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}")
_SPANS = re.compile(r"\$\$(.+?)\$\$|\\\[(.+?)\\\]|\\\((.+?)\\\)|(?<![\\\w])\$([^$\n]+?)(?<!\\)\$(?!\d)", re.DOTALL)


def final_answer(content: str, *, numeric: bool, multiline: bool = False) -> str | None:
    r"""Return the final answer of a content, or None if it has none.

    The first of these that the content has: the last `\boxed{}`, the last `<answer>`, the last "answer is X" or
    "Answer: X". Without a mark it is the last number if `numeric`, the whole content if `multiline`, else the last
    line that is not empty.
    """
    content = content.strip()
    marked = marked_answer(content)
    if marked:
        return _number_in(marked) if numeric else clean(marked)
    content = standing(content)
    if not content:
        return None
    if numeric:
        return _last_number(content)
    if multiline:
        return content
    return clean(content.splitlines()[-1]) or None


def marked_answer(content: str, *, whole_line: bool = False) -> str | None:
    r"""Return the answer that a content marks as such, unchanged, or None if it marks none.

    Boxes that one sentence joins ("\boxed{1} and \boxed{2}") are one answer. What the content takes back afterwards
    ("No wait, …") does not count. With `whole_line` a stated answer goes to the end of its line, not of its sentence.
    """
    content = standing(content)
    boxed = _restated(content, whole_line) or _boxed(content)
    stated = boxed or _tagged(content) or _keyed(content) or _stated(content, whole_line)
    return stated or _labelled(content) or _bold(content)


def standing(content: str) -> str:
    """Return the part of a content that it does not take back: what follows its last "No wait", if anything does."""
    retractions = list(_RETRACTION.finditer(content))
    if not retractions:
        return content.strip()
    taken_back = retractions[-1]
    rest = content[taken_back.end() :].strip(" ,.:;!—-\n")
    if _CONFIRMED.search(rest) and not _has_mark(rest):
        return content[: taken_back.start()].strip()
    return rest


def is_refusal(content: str) -> bool:
    """Say whether a content is a refusal to answer, such as "I'm sorry, but I can't help with that"."""
    start = content.strip().replace("’", "'")[:200]
    return _REFUSAL.match(start) is not None and not _has_mark(content)


def is_number(answer: str) -> bool:
    """Say whether an answer is one plain number, so that contents are searched for a number."""
    found = parse(answer)
    return found is not None and not found.unit and re.search(r"[/\\^a-df-zA-DF-Z]|\d\s\d", answer) is None


def clean(text: str) -> str:
    """Strip the decoration of an answer: white space, marks of Markdown and LaTeX, quotes, a final full stop."""
    text = text.strip()
    while True:
        stripped = text.strip('*_`"“” \t\n')
        stripped = stripped.strip("$") if stripped[:1] == stripped[-1:] == "$" else stripped  # else it is a currency
        stripped = stripped[:-1] if stripped.endswith(".") and not stripped.endswith("..") else stripped
        stripped = text_[1] if (text_ := _WHOLE_TEXT.fullmatch(stripped)) else stripped
        if stripped == text:
            return text
        text = stripped


def clause_of(text: str) -> str:
    """Return the part of a stated answer before its reason or remark: "42, since 40 + 2 is" gives "42"."""
    return re.split(r"[,;(]\s|\s\(|\s(?:since|because|as|which|so|where|when)\s", text, maxsplit=1)[0]


def math_spans(text: str) -> list[re.Match[str]]:
    r"""Return the formulas that a text sets apart by `$…$`, `$$…$$`, `\(…\)` or `\[…\]`; group 0 has the marks."""
    return list(_SPANS.finditer(text))


def _has_mark(text: str) -> bool:
    return bool(_boxed(text) or _tagged(text) or _keyed(text) or _stated(text))


def _boxed(text: str) -> str | None:
    r"""Return the text inside the last `\boxed{}`, with any braces in it, joined with those of boxes beside it."""
    boxes = [(box.start(), *_closed(text, box.end())) for box in _BOX.finditer(text)]
    boxes = [box for box in boxes if not any(start < box[0] < end for start, _, end in boxes)]  # not inside another
    if not boxes or boxes[-1][2] < 0:
        return None
    joined = [boxes[-1][1]]
    for (_, inside, end), (start, *_) in zip(boxes[-2::-1], boxes[:0:-1], strict=False):
        between = re.sub(r"\\text\s*\{([^{}]*)\}|[$\s]|\\[,;() ]", r"\1", text[end + 1 : start])
        if end < 0 or between.strip() not in (",", ";", "and", ",and", "or", ",or", "&"):
            break
        joined.insert(0, inside)
    behind = _UNIT_BEHIND.match(text, boxes[-1][2] + 1)
    unit = behind[1] if behind and measured(Fraction(1), behind[1]) and _is_bare(joined[-1]) else ""
    return f"{', '.join(joined)} {unit}".strip() or None


def _restated(text: str, whole_line: bool) -> str | None:
    """Return the value that a text states after its last box, as in "…, so without 1 the answer is 22."."""
    boxes = list(_BOX.finditer(text))
    end = _closed(text, boxes[-1].end())[1] if boxes else -1
    stated = _stated(text[end + 1 :], whole_line) if end >= 0 else None
    return stated if stated and re.match(r"\W*(?:\d|\\|[A-Z]\b)", stated) else None


def _is_bare(text: str) -> bool:
    found = parse(text)
    return found is not None and not found.unit


def _closed(text: str, begin: int) -> tuple[str, int]:
    """Return the text up to the brace that closes the one before `begin`, and where that is; -1 if none does."""
    depth = 1
    for i in range(begin, len(text)):
        if text[i] in "{}" and text[i - 1] != "\\":
            depth += 1 if text[i] == "{" else -1
        if not depth:
            return text[begin:i].strip(), i
    return "", -1


def _tagged(text: str) -> str | None:
    """Return the text inside the last closed `<answer>`."""
    folded = text.lower() if text.isascii() else text.replace("ANSWER>", "answer>").replace("Answer>", "answer>")
    end = folded.rfind("</answer>")
    start = folded.rfind("<answer>", 0, max(end, 0))
    return text[start + len("<answer>") : end].strip() or None if start >= 0 else None


def _keyed(text: str) -> str | None:
    """Return the answer in a JSON object, which may be in a code fence: `{"answer": "42"}`."""
    text = re.sub(r"^```\w*\n|\n```$", "", text.strip())
    if not (text.startswith("{") and text.endswith("}") and len(text) < 10_000):
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    value = next(
        (found[key] for key in ("answer", "final_answer") if isinstance(found.get(key), str | int | float)), None
    )
    return None if value is None else str(value).strip() or None


def _labelled(text: str) -> str | None:
    """Return what the last line gives a short name to, as in "**Domain:** x > 2"."""
    match = _LABEL.fullmatch(text.rpartition("\n")[2].strip())
    return match["value"].strip(" *") or None if match and not _NO_RESULT.search(match["name"]) else None


def _bold(text: str) -> str | None:
    """Return what the last line says in bold, as in "There are **42** apples.", unless the line doubts or denies it."""
    line = text.rpartition("\n")[2]
    bold = re.findall(r"\*\*([^*\n]{1,80}?)\*\*", line)
    if not bold or bold[-1].rstrip().endswith(":") or line.strip(" .!") == f"**{bold[-1]}**":
        return None
    clause = re.split(r"[,;:]\s", line.rpartition(f"**{bold[-1]}**")[0])[-1]
    return None if hedges(clause) else bold[-1].strip()


def _stated(text: str, whole_line: bool = False) -> str | None:
    """Return the X of the last "answer is X", up to the end of its sentence or of its line."""
    stated = list(_STATED.finditer(text))
    if not stated:
        return None
    rest = text[stated[-1].end() :].lstrip()
    if formula := re.match(r"\$\$.+?\$\$|\\\[.+?\\\]", rest, re.DOTALL):
        return formula[0]
    line = rest.partition("\n")[0].strip()
    if whole_line:
        return line or None
    return re.split(r"(?<=[^\s.])[.!](?:[*_`\s]|$)", line, maxsplit=1)[0] or None


def _number_in(text: str) -> str | None:
    """Return the number in a marked answer, such as 42 in "12 + 30 = 42 legs"; a formula stays whole."""
    result = plain(text).rsplit("=", 1)[-1]
    for part in (result, clause_of(clean(result))):
        found = parse(clean(part))
        if found is not None and found.unit != "%":
            return _tidy_number(part)
    clause = clause_of(result)
    is_formula = hedges(clause) or re.search(r"[-+*/^]\s*\w", clean(clause)[1:])
    return clean(result) if is_formula or len(quantities(clause)) != 1 else _tidy_number(clause)


def _last_number(text: str) -> str | None:
    """Return the last number of a text, or the whole of a formula without words; "7 or 8" gives None."""
    text = plain(text.splitlines()[-1]) or plain(text)
    formula = clean(text.rsplit("=", 1)[-1])
    if parse(formula):
        return _tidy_number(formula)
    if re.search(r"[-+*/^\\]\s*\w", formula[1:]) and not re.search(r"(?<![\\A-Za-z])[A-Za-z]{2,}", formula):
        return formula
    numbers = list(_NUMBER.finditer(formula))
    if not numbers or re.search(r"(?:\d\W*\bor|\bnot)\W*$", formula[: numbers[-1].start()][-40:]):
        return None
    return _tidy_number(numbers[-1][0])


_NUMBER = re.compile(
    r"(?<![\w.^{\\])[-+]?(?:(?:\d{1,3}(?:,\d{3})+(?![\d,])|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?|\.\d+)"
    r"(?!\d|\.\d|[abcijknxyz]\b|[/^_!}:])"
)


def _tidy_number(text: str) -> str:
    """Return the number in a text that has one, as it is written, but for its thousands separators and its plus."""
    found = _NUMBER.search(text)
    return found[0].replace(",", "").removeprefix("+") if found else clean(text)
