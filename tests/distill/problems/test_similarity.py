"""Near-duplicates, overlap and repetition against naive references."""

from __future__ import annotations

import random
import re
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepdistill.distill.problems.similarity import (
    contaminated,
    minhash,
    near_duplicates,
    ngrams,
    repeated_share,
    sign_questions,
    sign_texts,
    word_hashes,
)

VOCABULARY = [f"{a}{b}" for a in ("ba", "ko", "ri", "mu", "te") for b in ("lan", "pir", "son", "dek", "vum", "gra")]


def prose(seed: int, n: int = 40) -> str:
    """Return words that no two seeds have in the same order."""
    rng = random.Random(seed)
    return " ".join(rng.choice(VOCABULARY) for _ in range(n))


def changed(text: str, n: int, seed: int = 0) -> str:
    """Return the text with n of its words replaced."""
    words, rng = text.split(), random.Random(seed)
    for i in rng.sample(range(len(words)), n):
        words[i] = "otherwise"
    return " ".join(words)


def shingles(text: str, n: int) -> set[tuple[str, ...]]:
    words = text.lower().split()
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(VOCABULARY), min_size=3, max_size=60), st.integers(1, 8))
def test_ngrams_are_the_naive_ones(words: list[str], n: int) -> None:
    text = " ".join(words)
    grams = ngrams(word_hashes(text), n)
    assert len(grams) == max(len(words) - n, 0) + 1
    if n <= len(words):
        assert len(set(grams.tolist())) == len(shingles(text, n))
        repeated = 1 - len(shingles(text, n)) / (len(words) - n + 1)
        assert repeated_share(word_hashes(text), n) == pytest.approx(repeated)


def jaccard(a: str, b: str) -> float:
    one, two = shingles(a, 3), shingles(b, 3)
    return len(one & two) / len(one | two)


def test_signatures_agree_as_often_as_shingles_overlap() -> None:
    text = prose(3, 400)
    errors = []
    for n in range(0, 120, 6):
        other = changed(text, n)
        agreement = float((sign_texts(word_hashes(text)) == sign_texts(word_hashes(other))).mean())
        errors.append(agreement - jaccard(text, other))
    assert max(map(abs, errors)) < 0.2  # 64 hashes: a standard deviation of at most 0.0625
    assert abs(float(np.mean(errors))) < 0.05


def test_near_duplicates_are_those_of_all_pairs() -> None:
    texts = [prose(i, 60) for i in range(40)]
    texts += [changed(texts[i % 40], 1, i) for i in range(40)]
    signatures = np.array([minhash(ngrams(word_hashes(text), 3)) for text in texts])
    found = near_duplicates(signatures, 0.8, lambda i, others: np.ones(len(others), np.bool_))
    assert found[:40].tolist() == [-1] * 40
    for i in range(40, 80):
        alike = [j for j in range(40) if jaccard(texts[i], texts[j]) > 0.75]
        assert alike == [i - 40]
        # An estimate below the threshold is no fault of the search.
        agrees = float((signatures[i] == signatures[i - 40]).mean()) >= 0.8
        assert found[i] == (i - 40 if agrees else -1)
    assert np.count_nonzero(found >= 0) >= 30


def test_what_may_not_match_does_not() -> None:
    signatures = np.array([sign_texts(word_hashes(prose(1)))] * 3)
    assert near_duplicates(signatures, 0.8, lambda i, others: others == 1).tolist() == [-1, -1, 1]


def test_a_templates_words_are_not_a_questions_own() -> None:
    questions = [f"please transform the word given at the end into its plural {prose(i, 4)}" for i in range(60)]
    _, is_distinctive = sign_questions([word_hashes(q) for q in questions])
    assert is_distinctive.all()
    _, is_distinctive = sign_questions([word_hashes("please transform the word given at the end")] * 60)
    assert not is_distinctive.any()


PREAMBLE = "You may call get_weather(city). Reply only with a JSON object with name and arguments. Weather in"
CITIES = [
    "Rome",
    "Paris",
    "Oslo",
    "Lima",
    "Cairo",
    "Delhi",
    "Tokyo",
    "Bern",
    "Madrid",
    "Berlin",
    "Athens",
    "Dublin",
    "Lisbon",
    "Vienna",
    "Prague",
    "Riga",
]


@pytest.mark.parametrize(("n_questions", "n_exams"), [(3, 2), (6, 1), (6, 2), (10, 3), (13, 3)])
def test_a_preamble_that_few_questions_share_makes_none_of_them_alike(n_questions: int, n_exams: int) -> None:
    questions = [word_hashes(f"{PREAMBLE} {city}?") for city in CITIES[:n_questions]]
    exams = [word_hashes(f"{PREAMBLE} {city}?") for city in CITIES[-n_exams:]]
    assert contaminated(questions, exams).tolist() == [-1] * n_questions
    assert contaminated([*questions, exams[0]], exams).tolist() == [-1] * n_questions + [0]
    if n_questions > 4:
        signatures, is_distinctive = sign_questions(questions)
        repeated = near_duplicates(signatures, 0.85, lambda i, others: is_distinctive[others] & is_distinctive[i])
        assert repeated.tolist() == [-1] * n_questions


def naive_overlap(question: str, exams: list[str], n: int = 8) -> int:
    clean: Callable[[str], str] = lambda text: re.sub(r"[?.,]", "", text)  # noqa: E731
    return next((i for i, exam in enumerate(exams) if shingles(clean(question), n) & shingles(clean(exam), n)), -1)


def test_overlap_of_prose_is_that_of_all_pairs() -> None:
    exams = [f"{prose(i, 14)}, {prose(1000 + i, 8)}?" for i in range(30)]
    questions = [prose(5000 + i, 20) for i in range(60)]
    for i in range(0, 60, 2):
        words = exams[i % 30].split()
        questions[i] = f"{prose(i, 5)} {' '.join(words[3 : 3 + 5 + i % 7])} {prose(9000 + i, 5)}"
    found = contaminated([word_hashes(q) for q in questions], [word_hashes(e) for e in exams])
    assert found.tolist() == [naive_overlap(q, exams) for q in questions]
    assert {-1} < set(found.tolist())
