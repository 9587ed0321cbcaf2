"""The same JSON value as the reference, whatever stands around it: a code fence, prose, other spaces, an order of keys.

Numbers are compared by value (1 is 1.0, not true and not "1"), strings without the white space around them, lists in
order. The score is the share of fields that agree; only the whole value is right.
"""

from __future__ import annotations

import json
import re
from typing import Any

from .answer import clean
from .base import CannotTell, Submission
from .json_schema import parse

_MISSING = object()
_DECODER, _BRACKET = json.JSONDecoder(), re.compile(r"[{\[]")


def grade(submission: Submission) -> float:
    """Return the share of the reference's and the document's fields that are the same; 1.0 for the same value.

    Raises:
        CannotTell: the reference is not JSON.
    """
    try:
        gold = parse(submission.reference())
    except (ValueError, RecursionError) as error:
        raise CannotTell(f"the reference {submission.reference()[:40]!r} is not JSON") from error
    try:
        answer = parse(find(submission.content, submission.reference()) or "")
    except (ValueError, RecursionError):
        return 0.0
    same, fields = _compared(gold, answer)
    return same / fields


def find(content: str, reference: str = "{") -> str | None:
    """Return the text of the last JSON in a content that opens as the reference does; None if no JSON does."""
    opening, found, at = reference.lstrip()[:1], None, 0
    if opening not in ("{", "["):
        return clean(content)
    while (starts := _BRACKET.search(content, at)) is not None:
        at = starts.start()
        try:
            end = _DECODER.raw_decode(content, at)[1]
            parse(content[at:end])
        except ValueError:
            end = at + 1
        except RecursionError:
            break
        else:
            found = content[at:end] if content[at] == opening else found
        at = end
    return found


def _compared(gold: Any, answer: Any) -> tuple[int, int]:
    """Return how many fields are the same, and how many there are in either value."""
    one, other = _fields(gold), _fields(answer)
    if type(gold) is type(answer) and (one or other):
        counts = [_compared(one.get(name, _MISSING), other.get(name, _MISSING)) for name in {**one, **other}]
        return sum(same for same, _ in counts), sum(n for _, n in counts)
    return int(_is_same(gold, answer)), max(_n_fields(gold), _n_fields(answer))


def _fields(value: Any) -> dict[Any, Any]:
    """Return what an object or a list holds, by name or place; nothing for other values."""
    return value if isinstance(value, dict) else dict(enumerate(value)) if isinstance(value, list) else {}


def _n_fields(value: Any) -> int:
    return max(1, sum(map(_n_fields, _fields(value).values())))


def _is_same(gold: Any, answer: Any) -> bool:
    if isinstance(gold, str) and isinstance(answer, str):
        return gold.strip() == answer.strip()
    return bool(gold == answer) and isinstance(gold, bool) == isinstance(answer, bool)
