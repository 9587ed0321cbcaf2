"""The same day: `2026-03-01` is `March 1, 2026` is `1 March 2026`.

03/04/2026 may be two days: such a text only equals itself.
"""

from __future__ import annotations

import datetime
import re

from .answer import clean, marked_answer, standing
from .base import CannotTell, Submission

_MONTHS = re.findall(r"\w+", "january february march april may june july august september october november december")
_MONTH = r"(?P<month>(?:jan|feb|mar|apr|may|jun|jul|aug|sep|sept|oct|nov|dec)[a-z]*)\.?"
_DAY, _YEAR = r"(?P<day>\d{1,2})(?:st|nd|rd|th)?", r"(?P<year>\d{4})"
_FORMS = [
    re.compile(rf"(?<![\w/-]){form}(?![\w/-])", re.IGNORECASE)
    for form in (
        rf"{_YEAR}[-/.](?P<month>\d{{1,2}})[-/.](?P<day>\d{{1,2}})",
        rf"{_MONTH}\s+(?:the\s+)?{_DAY}(?:,|\s)\s*{_YEAR}",
        rf"(?:the\s+)?{_DAY}\s+(?:of\s+)?{_MONTH},?\s+{_YEAR}",
        rf"(?P<first>\d{{1,2}})([-/.])(?P<second>\d{{1,2}})\2{_YEAR}",
    )
]

Days = frozenset[datetime.date]
"""The days that a text may mean: one, or two where day and month cannot be told apart."""


def grade(submission: Submission) -> float:
    """Return 1.0 for the day of the reference, 0.0 for another.

    Raises:
        CannotTell: the reference is not a date, the answer has several, or one of them may be another day.
    """
    gold_text = clean(submission.reference())
    gold = read(gold_text)
    if gold is None:
        raise CannotTell(f"the reference {gold_text[:40]!r} is not a date")
    found = find(submission.content)
    if not found:
        return 0.0
    if len({days for _, days in found}) > 1:
        raise CannotTell("the answer has several dates")
    text, answer = found[-1]
    if text == gold_text:
        return 1.0
    if gold & answer and len(gold | answer) > 1:
        raise CannotTell("day and month cannot be told apart")
    return 1.0 if gold == answer else 0.0


def read(text: str) -> Days | None:
    """Return the days that a text may mean; None if the whole text is not a date."""
    text = clean(text)
    found = _all(text)
    return found[0][1] if len(found) == 1 and found[0][0] == text else None


def find(content: str) -> list[tuple[str, Days]]:
    """Return the dates of the answer that a content marks, else of its last line with one."""
    marked = marked_answer(content, whole_line=True)
    texts = [marked] if marked and _all(marked) else reversed(standing(content).splitlines())
    return next((found for text in texts if (found := _all(text))), [])


def _all(text: str) -> list[tuple[str, Days]]:
    found = [(match.start(), match[0], _days(match)) for form in _FORMS for match in form.finditer(text)]
    return [(text, days) for _, text, days in sorted(found, key=lambda one: one[0]) if days]


def _days(match: re.Match[str]) -> Days:
    parts = match.groupdict()
    year = int(parts["year"])
    if "first" in parts:
        first, second = int(parts["first"]), int(parts["second"])
        pairs = {(first, second), (second, first)}
    else:
        name = parts["month"].casefold()
        months = [i for i, month in enumerate(_MONTHS, 1) if month.startswith(name) or (name == "sept" and i == 9)]
        pairs = {(int(parts["day"]), int(name) if name.isdigit() else months[0] if months else 0)}
    days = set()
    for day, month in pairs:
        try:
            days.add(datetime.date(year, month, day))
        except ValueError:
            continue
    return frozenset(days)
