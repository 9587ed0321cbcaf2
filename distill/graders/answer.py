"""Find the final answer in a model's content, never in its thinking: one function for every caller."""

from __future__ import annotations

import re

_NUMBER = re.compile(
    r"(?<![\w.])[-+]?(?:(?:\d{1,3}(?:,\d{3})+(?![\d,])|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?|\.\d+)(?!\d|\.\d|[abcijknxyz]\b)"
)
_MARKED = re.compile(r"\banswer\b[*_`\"'’s]*\s*(?:is|was|=|:)+[*_`\s]*:?\s*(?P<answer>[^\n]+)", re.IGNORECASE)


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
    if not content:
        return None
    if numeric:
        return _last_number(_plain_signs(content))
    if multiline:
        return content
    return clean(content.splitlines()[-1]) or None


def marked_answer(content: str) -> str | None:
    """Return the answer that a content marks as such, unchanged, or None if it marks none."""
    return _boxed(content) or _tagged(content) or _stated(content)


def is_number(answer: str) -> bool:
    """Say whether an answer is one plain number, so that contents are searched for a number."""
    return _NUMBER.fullmatch(_plain_signs(answer.strip())) is not None


def clean(text: str) -> str:
    """Strip the decoration of an answer: white space, Markdown marks, dollar signs, quotes, a final full stop."""
    text = text.strip()
    while True:
        stripped = text.strip('*_`"“”$ \t\n')
        stripped = stripped[:-1] if stripped.endswith(".") and not stripped.endswith("..") else stripped
        if stripped == text:
            return text
        text = stripped


def _boxed(text: str) -> str | None:
    r"""Return the text inside the last `\boxed{}`, with any braces in it."""
    start = max(text.rfind("\\boxed{"), text.rfind("\\fbox{"))
    if start < 0:
        return None
    begin = text.index("{", start) + 1
    depth = 1
    for i in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if not depth:
            return text[begin:i].strip()
    return None


def _tagged(text: str) -> str | None:
    """Return the text inside the last closed `<answer>`."""
    folded = text.lower() if text.isascii() else text.replace("ANSWER>", "answer>").replace("Answer>", "answer>")
    end = folded.rfind("</answer>")
    start = folded.rfind("<answer>", 0, max(end, 0))
    return text[start + len("<answer>") : end].strip() or None if start >= 0 else None


def _stated(text: str) -> str | None:
    """Return the X of the last "answer is X", up to the end of its sentence."""
    found = [match["answer"] for match in _MARKED.finditer(text)]
    return re.split(r"(?<=[^\s.])\.(?:\s|$)", found[-1].strip(), maxsplit=1)[0] or None if found else None


def _number_in(text: str) -> str | None:
    """Return the number in a marked answer, such as 42 in "12 + 30 = 42 legs"; a formula stays whole."""
    text = _plain_signs(re.sub(r"\\text\s*\{[^}]*\}|\\[,;!% ]|\\left|\\right|\$", " ", text))
    result = re.split(r"[,;(]\s", text.rsplit("=", 1)[-1])[0]
    if re.search(r"\\[a-zA-Z]+|[\w)]\s*[-+*/^]\s*[\w(]", result):
        return clean(result)
    numbers = _NUMBER.findall(result)
    return _tidy_number(numbers[0]) if numbers else clean(text)


def _last_number(text: str) -> str | None:
    """Return the last number of a text, or the whole of a formula without words; "7 or 8" gives None."""
    formula = clean(text.splitlines()[-1].rsplit("=", 1)[-1])
    if re.search(r"[-+*/^\\]\s*\w", formula[1:]) and not re.search(r"(?<![\\A-Za-z])[A-Za-z]{2,}", formula):
        return formula
    numbers = list(_NUMBER.finditer(text))
    if not numbers or re.search(r"(?:\d\W*\bor|\bnot)\W*$", text[: numbers[-1].start()][-40:]):
        return None
    return _tidy_number(numbers[-1][0])


def _plain_signs(text: str) -> str:
    return text.replace("−", "-").replace("–", "-")


def _tidy_number(number: str) -> str:
    return number.replace(",", "").removeprefix("+")
