"""Which texts say the same: near-duplicates by MinHash, overlap with evaluation questions, repetition within a text.

A text is the array of its words' hashes (`word_hashes`), so that a million of them fit in memory and every answer is
the same in every process. Two things keep problems made from a template apart, which plain n-gram overlap would all
call the same: n-grams that a good part of the questions have in common say nothing about any of them, and texts with
different numbers are different problems.
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

from .split import normalise_question

Words: TypeAlias = npt.NDArray[np.uint32]
"""Hashes of a text's words in order; the lowest bit says that the word holds a digit."""
Grams: TypeAlias = npt.NDArray[np.uint64]

N_HASHES = 64  # a similarity is off by 0.05 (one standard deviation) at 0.8
_ROWS = 4  # of a band; 16 bands find a pair of similarity 0.8 with a probability of 99.98 %
_BUCKET = 50  # texts of one bucket that the next is compared with, at most
_SHINGLE = 3  # words
_NUMBER = np.uint32(1)
_PUNCTUATION = ".,;:?\"'`“”‘’«»$…"
_FACTORS, _OFFSETS = np.frombuffer(
    hashlib.shake_256(b"deepdistill minhash").digest(16 * N_HASHES), np.dtype("<u8")
).reshape(2, N_HASHES, 1) | np.uint64(1)


def word_hashes(text: str) -> Words:
    """Return the hashes of a text's words: normalised as the split does, punctuation at their ends left out."""
    return np.fromiter(map(_hash_word, normalise_question(text).split()), np.uint32)


@lru_cache(1 << 17)
def _hash_word(word: str) -> int:
    word = word.strip(_PUNCTUATION) or word  # a dot that stands alone may be a cell of a board
    return zlib.crc32(word.encode("utf-8", "surrogatepass")) & ~1 | (re.search(r"\d", word) is not None)


def numbers_in(words: Words) -> int:
    """Return a hash of the words that hold a digit, whatever their order: the same numbers have the same hash."""
    return digest(np.sort(words[words & _NUMBER == 1]))


def digest(words: Words) -> int:
    """Return a 64-bit hash of a whole text."""
    return int.from_bytes(hashlib.blake2b(words.tobytes(), digest_size=8).digest(), "little")


def ngrams(words: Words, n: int) -> Grams:
    """Return the hashes of every n words in a row; of a shorter text the one hash of all its words."""
    if not len(words):
        return np.zeros(0, np.uint64)
    n = min(n, len(words))
    grams = np.full(len(words) - n + 1, n, np.uint64)
    for i in range(n):
        grams = (grams ^ words[i : i + len(grams)]) * np.uint64(0x9E3779B97F4A7C15)
        grams ^= grams >> np.uint64(29)
    return grams


def repeated_share(words: Words, n: int = 8) -> float:
    """Return the share of a text's n-grams that stood in it before.

    Source: seq-rep-n, Welleck et al., Neural text generation with unlikelihood training, arXiv 1908.04319.
    """
    grams = ngrams(words, n)
    return 1 - len(np.unique(grams)) / len(grams) if len(grams) else 0.0


def minhash(grams: Grams) -> npt.NDArray[np.uint16]:
    """Return a text's signature, [64]: two texts agree in as many places as their n-grams overlap (Jaccard).

    Source: Broder, On the resemblance and containment of documents, 1997; 16 bits of each minimum are kept, after
    Li and König, b-bit minwise hashing, 2010.
    """
    least: npt.NDArray[np.uint64] = ((_FACTORS * grams + _OFFSETS) >> np.uint64(32)).min(axis=1)
    return (least & np.uint64(0xFFFF)).astype(np.uint16)


def sign_texts(words: Words) -> npt.NDArray[np.uint16]:
    """Return the signature of a text's three-word shingles; a text without words has that of nothing else."""
    return minhash(ngrams(words, _SHINGLE)) if len(words) else np.zeros(N_HASHES, np.uint16)


def sign_questions(questions: Sequence[Words]) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.bool_]]:
    """Return signatures [N, 64] of what is each question's own, and which questions have anything of their own.

    Shingles that stand in more than 1 % of the questions (and in more than 10) are left out: the words of a template.
    """
    counts = np.zeros(1 << 22, np.uint32)  # shingles share counters: far fewer than the bound fall together
    slots = np.uint64(len(counts) - 1)
    for words in questions:
        counts[np.unique(ngrams(words, _SHINGLE) & slots)] += 1
    too_many = max(10, len(questions) // 100)
    signatures = np.zeros((len(questions), N_HASHES), np.uint16)
    has_own = np.zeros(len(questions), np.bool_)
    for i, words in enumerate(questions):
        shingles = ngrams(words, _SHINGLE)
        own = shingles[counts[shingles & slots] <= too_many]
        if len(own):
            signatures[i], has_own[i] = minhash(own), True
    return signatures, has_own


def near_duplicates(
    signatures: npt.NDArray[np.uint16],
    threshold: float,
    may_match: Callable[[int, npt.NDArray[np.int64]], npt.NDArray[np.bool_]],
) -> npt.NDArray[np.int64]:
    """Return for each text the earlier one that it repeats, -1 for those that stay; [N].

    Texts repeat each other if their signatures agree in at least `threshold` of the places and `may_match(i, others)`,
    which looks at what the signatures do not hold, agrees. A text is compared with those that stay alone.
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
    """Return [N, bands]: the number of the group of texts that agree in a band, -1 for one that is alone in it."""
    bands = np.ascontiguousarray(signatures).view(np.uint64)  # _ROWS x 16 bits
    groups = np.empty(bands.shape, np.int32)
    for band in range(bands.shape[1]):
        _, group, count = np.unique(bands[:, band], return_inverse=True, return_counts=True)
        groups[:, band] = np.where(count[group] > 1, group, -1)
    return groups


def contaminated(questions: Sequence[Words], evaluation: Sequence[Words], n: int = 8) -> npt.NDArray[np.int64]:
    """Return for each question the index of an evaluation question that stands in it, else -1; [N].

    It does if the two are the same once normalised, or share n words in a row. Words in a row that with their numbers
    masked are found in more than 1 % of the evaluation questions (and in more than 2) or in more than 5 % of the
    questions (and in more than 10) do not count. An evaluation question of which such words make up a fifth was made
    from a template: half of its other n words in a row have to be found, and at least n of them.
    """
    whole = {digest(words): i for i, words in reversed(list(enumerate(evaluation))) if len(words)}
    index = _OwnGrams({i: evaluation[i] for i in sorted(whole.values())}, questions, n)
    found = np.full(len(questions), -1, np.int64)
    for i, words in enumerate(questions):
        same = whole.get(digest(words), -1)
        found[i] = same if same >= 0 else index.find(words)
    return found


class _OwnGrams:
    """The n-grams that are an evaluation question's own, and how many of each have to be found."""

    def __init__(self, evaluation: dict[int, Words], questions: Sequence[Words], n: int) -> None:
        self.n = n
        long = {i: words for i, words in evaluation.items() if len(words) >= n}
        common = _common(list(long.values()), questions, n)
        short = max(1, n // 2)  # a template's words may stand in fewer than n at once
        common_short = _common(list(long.values()), questions, short)
        own = {i: np.unique(ngrams(w, n)[~np.isin(ngrams(_masked(w), n), common)]) for i, w in long.items()}
        self._needed = {
            i: max(n, (len(own[i]) + 1) // 2) if np.isin(ngrams(_masked(w), short), common_short).mean() >= 0.2 else 1
            for i, w in long.items()
        }
        grams = np.concatenate([np.zeros(0, np.uint64), *own.values()])
        order = np.argsort(grams, kind="stable")
        self._grams = grams[order]
        self._owners = np.repeat(np.array(list(own), np.int64), [len(grams) for grams in own.values()])[order]

    def find(self, words: Words) -> int:
        """Return the first evaluation question of which enough is found, else -1."""
        grams = np.unique(ngrams(words, self.n))
        first, last = np.searchsorted(self._grams, grams), np.searchsorted(self._grams, grams, "right")
        found = np.flatnonzero(first < last)
        shared = Counter(owner for i in found for owner in self._owners[first[i] : last[i]].tolist())
        return min((owner for owner, count in shared.items() if count >= self._needed[owner]), default=-1)


def _common(evaluation: Sequence[Words], questions: Sequence[Words], n: int) -> Grams:
    """Return the n-grams, numbers masked, that too many questions share for them to tell one from another."""
    each = [np.unique(ngrams(_masked(words), n)) for words in evaluation]
    known, in_evaluation = np.unique(np.concatenate([np.zeros(0, np.uint64), *each]), return_counts=True)
    in_questions = np.zeros(len(known), np.int64)
    for words in questions:
        grams = np.unique(ngrams(_masked(words), n))
        places = np.searchsorted(known, grams)
        grams, places = grams[places < len(known)], places[places < len(known)]
        in_questions[places[known[places] == grams]] += 1
    return known[(in_evaluation > max(2, len(evaluation) // 100)) | (in_questions > max(10, len(questions) // 20))]


def _masked(words: Words) -> Words:
    return np.where(words & _NUMBER == 1, _NUMBER, words)
