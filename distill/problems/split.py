"""The one split that every seed, source and command agrees on: a fixed hash of the question.

A question's bucket depends on its words alone (in a conversation, those of the user's turns). So a training set never
contains a question of an evaluation, whatever the seed, file or order of either. The pocket teacher was trained on the
`train` bucket too.
"""

from __future__ import annotations

import hashlib
import unicodedata
from typing import Literal

Bucket = Literal["train", "validation", "test"]

_TRAIN_SHARE, _VALIDATION_SHARE = 80, 5  # per cent; the rest is `test`


def normalise_question(question: str) -> str:
    """Return the question in the form that is hashed: NFKC, lower case, single spaces."""
    return " ".join(unicodedata.normalize("NFKC", question).lower().split())


def question_hash(question: str) -> str:
    """Return the hex SHA-256 of the normalised question."""
    return _sha256(normalise_question(question))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def question_id(question: str) -> str:
    """Return the id of a problem, 16 hex digits: that of the same question in other case or with other white space.

    The split's normalisation takes 5² for 52. Both are in one bucket, but they are two problems.
    """
    text = same_meaning(question)
    digest = question_hash(question) if text == normalise_question(question) else _sha256(text)
    return digest[:16]


def same_meaning(question: str) -> str:
    """Return the question in NFC, lower case and with single spaces: equal forms mean the same."""
    return " ".join(unicodedata.normalize("NFC", question).lower().split())


def bucket_of(question: str) -> Bucket:
    """Return the bucket a question belongs to: 80 % train, 5 % validation, 15 % test."""
    share = int(question_hash(question)[:8], 16) % 100
    if share < _TRAIN_SHARE:
        return "train"
    return "validation" if share < _TRAIN_SHARE + _VALIDATION_SHARE else "test"
