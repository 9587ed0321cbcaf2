"""Which texts say the same: near-duplicates by MinHash, overlap with evaluation questions, repetition within a text.

A text is an array of its words' hashes (`word_hashes`), so that a million texts fit in memory and every process gets
the same result. Plain n-gram overlap would call all problems of one template the same. Two rules keep them apart:
n-grams that many questions share say nothing about any of them, and texts with different numbers are different.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from .split import same_meaning

Words: TypeAlias = npt.NDArray[np.uint32]
"""Hashes of a text's words in order, [W]; the lowest bit says that the word has a digit."""
Grams: TypeAlias = npt.NDArray[np.uint64]

N_HASHES = 64  # a similarity is off by 0.05 (one standard deviation) at 0.8
_BUCKET = 50  # texts of one bucket that the next text is compared with, at most
_SHINGLE = 3  # words
_NUMBER = np.uint32(1)
_PUNCTUATION = ".,;:?\"'`“”‘’«»$…"
_FACTORS, _OFFSETS = np.frombuffer(
    hashlib.shake_256(b"deepdistill minhash").digest(16 * N_HASHES), np.dtype("<u8")
).reshape(2, N_HASHES, 1) | np.uint64(1)


def word_hashes(text: str) -> Words:
    """Return the hashes of a text's words, [W], in lower case and without punctuation at their ends."""
    return np.fromiter(map(_hash_word, same_meaning(text).split()), np.uint32)


@lru_cache(1 << 17)
def _hash_word(word: str) -> int:
    word = word.strip(_PUNCTUATION) or word  # a dot alone may be a cell of a board
    return zlib.crc32(word.encode("utf-8", "surrogatepass")) & ~1 | (re.search(r"\d", word) is not None)


def numbers_in(words: Words) -> int:
    """Return a hash of the words that have a digit, in any order: the same numbers have the same hash."""
    return digest(np.sort(words[words & _NUMBER == 1]))


def digest(words: Words) -> int:
    """Return a 64-bit hash of a whole text."""
    return int.from_bytes(hashlib.blake2b(words.tobytes(), digest_size=8).digest(), "little")


def ngrams(words: Words, n: int) -> Grams:
    """Return the hash of every n words in a row, [W - n + 1]; of a shorter text, one hash of all its words."""
    if not len(words):
        return np.zeros(0, np.uint64)
    n = min(n, len(words))
    grams = np.full(len(words) - n + 1, n, np.uint64)
    for i in range(n):  # multiply by 2**64 / golden ratio and mix the high bits down: every word changes every bit
        grams = (grams ^ words[i : i + len(grams)]) * np.uint64(0x9E3779B97F4A7C15)
        grams ^= grams >> np.uint64(29)
    return grams


def repeated_share(words: Words, n: int = 8) -> float:
    """Return the share of a text's n-grams that occur earlier in it.

    Source: seq-rep-n, Welleck et al., Neural text generation with unlikelihood training, arXiv 1908.04319.
    """
    grams = ngrams(words, n)
    return 1 - len(np.unique(grams)) / len(grams) if len(grams) else 0.0


def minhash(grams: Grams) -> npt.NDArray[np.uint16]:
    """Return a text's signature, [64]: the share of places where two agree estimates their n-grams' Jaccard overlap.

    Source: Broder, On the resemblance and containment of documents, 1997; 16 bits of each minimum are kept, after
    Li and König, b-bit minwise hashing, 2010.
    """
    # Multiply-shift: the high half of a·x + b with odd a is a fresh random order of the n-grams for each (a, b).
    least: npt.NDArray[np.uint64] = ((_FACTORS * grams + _OFFSETS) >> np.uint64(32)).min(axis=1)
    return (least & np.uint64(0xFFFF)).astype(np.uint16)


def sign_texts(words: Words) -> npt.NDArray[np.uint16]:
    """Return the signature of a text's three-word shingles, [64]; that of a text without words is all zeros."""
    return minhash(ngrams(words, _SHINGLE)) if len(words) else np.zeros(N_HASHES, np.uint16)


def sign_questions(questions: Sequence[Words]) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.bool_]]:
    """Return signatures of the questions' distinctive shingles, [N, 64], and which questions have any, [N].

    Shingles in more than 1 % of the questions (and in more than 10), or in more than half of them (and in more than 4),
    are the words of a template, and left out.
    """
    counts = np.zeros(1 << 22, np.uint32)  # shingles share counters: a few collisions stay far below the bound
    slots = np.uint64(len(counts) - 1)
    for words in questions:
        counts[np.unique(ngrams(words, _SHINGLE) & slots)] += 1
    too_many = min(max(10, len(questions) // 100), max(4, len(questions) // 2))
    signatures = np.zeros((len(questions), N_HASHES), np.uint16)
    is_distinctive = np.zeros(len(questions), np.bool_)
    for i, words in enumerate(questions):
        shingles = ngrams(words, _SHINGLE)
        rare = shingles[counts[shingles & slots] <= too_many]
        if len(rare):
            signatures[i], is_distinctive[i] = minhash(rare), True
    return signatures, is_distinctive


def near_duplicates(
    signatures: npt.NDArray[np.uint16],
    threshold: float,
    may_match: Callable[[int, npt.NDArray[np.int64]], npt.NDArray[np.bool_]],
) -> npt.NDArray[np.int64]:
    """Return for each text the index of the earlier one that it repeats, -1 for those that stay; [N].

    A text repeats another if their signatures agree in at least `threshold` of the places and `may_match(i, others)`,
    which knows more than the signatures, agrees. It is compared only with texts that stay.
    """
    n = len(signatures)
    repeats = np.full(n, -1, np.int64)
    groups = _shared_bands(signatures)
    buckets: list[dict[int, list[int]]] = [{} for _ in range(groups.shape[1])]
    for i in np.flatnonzero((groups >= 0).any(axis=1)).tolist():
        places = [(buckets[band], group) for band, group in enumerate(groups[i].tolist()) if group >= 0]
        near = np.array(sorted({other for bucket, group in places for other in bucket.get(group, ())}), np.int64)
        if len(near):
            alike = (signatures[near] == signatures[i]).mean(axis=1) >= threshold
            near = near[alike]
            near = near[may_match(i, near)] if len(near) else near
        if len(near):
            repeats[i] = near[0]
            continue
        for bucket, group in places:
            members = bucket.setdefault(group, [])
            if len(members) < _BUCKET:
                members.append(i)
    return repeats


def _shared_bands(signatures: npt.NDArray[np.uint16]) -> npt.NDArray[np.int32]:
    """Return the group of texts that agree in a band, by number, or -1 for a text alone in it; [N, 16]."""
    # Bands of four places: 16 of them find a pair of similarity 0.8 with a probability of 99.98 %.
    bands = np.ascontiguousarray(signatures).view(np.uint64)  # [N, 16]
    groups = np.empty(bands.shape, np.int32)
    for band in range(bands.shape[1]):
        _, group, count = np.unique(bands[:, band], return_inverse=True, return_counts=True)
        groups[:, band] = np.where(count[group] > 1, group, -1)
    return groups


def contaminated(questions: Sequence[Words], evaluation: Sequence[Words], n: int = 8) -> npt.NDArray[np.int64]:
    """Return for each question the index of an evaluation question that it contains, else -1; [N].

    It contains one if both are the same once normalised, or share a distinctive n-gram of words. An n-gram is common,
    and does not count, if with numbers masked it is in more than 1 % of the evaluation questions (and in more than 2),
    in more than 5 % of the questions (and in more than 10), or in more than half of both together (and in more than 4).
    If common n-grams make up a fifth of an evaluation question, it comes from a template: then half of its distinctive
    n-grams must be shared, and at least n.
    """
    whole = {digest(words): i for i, words in reversed(list(enumerate(evaluation))) if len(words)}
    index = _DistinctiveGrams({i: evaluation[i] for i in sorted(whole.values())}, questions, n)
    found = np.full(len(questions), -1, np.int64)
    for i, words in enumerate(questions):
        same = whole.get(digest(words), -1)
        found[i] = same if same >= 0 else index.find(words)
    return found


class _DistinctiveGrams:
    """The distinctive n-grams of evaluation questions, and how many of each question's must be found."""

    def __init__(self, evaluation: dict[int, Words], questions: Sequence[Words], n: int) -> None:
        self.n = n
        long = {i: words for i, words in evaluation.items() if len(words) >= n}
        common = _common(list(long.values()), questions, n)
        short = max(1, n // 2)  # a template may have fewer than n words in a row
        common_short = _common(list(long.values()), questions, short)
        rare = {i: np.unique(ngrams(w, n)[~np.isin(ngrams(_masked(w), n), common)]) for i, w in long.items()}
        self._needed = {
            i: max(n, (len(rare[i]) + 1) // 2) if np.isin(ngrams(_masked(w), short), common_short).mean() >= 0.2 else 1
            for i, w in long.items()
        }
        grams = np.concatenate([np.zeros(0, np.uint64), *rare.values()])
        order = np.argsort(grams, kind="stable")
        self._grams = grams[order]
        self._owners = np.repeat(np.array(list(rare), np.int64), [len(grams) for grams in rare.values()])[order]

    def find(self, words: Words) -> int:
        """Return the first evaluation question with enough n-grams in the text, else -1."""
        grams = np.unique(ngrams(words, self.n))
        first, last = np.searchsorted(self._grams, grams), np.searchsorted(self._grams, grams, "right")
        found = np.flatnonzero(first < last)
        shared = Counter(owner for i in found for owner in self._owners[first[i] : last[i]].tolist())
        return min((owner for owner, count in shared.items() if count >= self._needed[owner]), default=-1)


def _common(evaluation: Sequence[Words], questions: Sequence[Words], n: int) -> Grams:
    """Return the n-grams, with numbers masked, that are common: too many questions share them."""
    each = [np.unique(ngrams(_masked(words), n)) for words in evaluation]
    known, in_evaluation = np.unique(np.concatenate([np.zeros(0, np.uint64), *each]), return_counts=True)
    in_questions = np.zeros(len(known), np.int64)
    for words in questions:
        grams = np.unique(ngrams(_masked(words), n))
        places = np.searchsorted(known, grams)
        grams, places = grams[places < len(known)], places[places < len(known)]
        in_questions[places[known[places] == grams]] += 1
    return known[
        (in_evaluation > max(2, len(evaluation) // 100))
        | (in_questions > max(10, len(questions) // 20))
        | (in_evaluation + in_questions > max(4, (len(evaluation) + len(questions)) // 2))
    ]


def _masked(words: Words) -> Words:
    return np.where(words & _NUMBER == 1, _NUMBER, words)
