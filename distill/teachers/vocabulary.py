"""Whether two models use the same token ids, by a fingerprint of the vocabulary, or else by a stress text.

A teacher's log-probabilities can train a student only if both number their tokens alike. A checkpoint and the GGUF made
from it have the same fingerprint: tokens that only pad the embedding are left out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from ...localrun.gguf.header import read_gguf
from ..tokenizer import Tokenizer, ids_of

_UNUSED = 5  # llama.cpp's type for a token that only pads the embedding
STRESS_TEXT = (
    'Déjà vu: 3.14159 + 2,718 = 5.85959…\n\tif (x != y) { return "naïve"; }  /* 日本語 한국어 */\n\n'
    "The quick brown fox jumps over 1234567890 lazy dogs — don't you think so? 🦊🐶 \\frac{a}{b} <think> x²\n"
)


def fingerprint(tokens: Iterable[tuple[int, str]]) -> str:
    """Return a short hash of (id, token) pairs, whatever their order."""
    digest = hashlib.sha256()
    for number, token in sorted(tokens):
        digest.update(f"{number}\0{token}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:16]


def of_tokenizer(tokenizer: Tokenizer) -> str:
    """Return the fingerprint of a Hugging Face tokenizer's vocabulary, added tokens included."""
    return fingerprint((number, token) for token, number in tokenizer.get_vocab().items())


def of_gguf(path: Path) -> str | None:
    """Return the fingerprint of a GGUF's vocabulary; None if it carries none."""
    metadata = read_gguf(path).metadata
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not tokens:
        return None
    types = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    return fingerprint((i, token) for i, token in enumerate(tokens) if types[i] != _UNUSED)


def is_same(known: str | None, tokenizer: Tokenizer) -> bool | None:
    """Say whether a recorded fingerprint is this tokenizer's; None if none was recorded."""
    return None if known is None else known == of_tokenizer(tokenizer)


def tokenizes_alike(ids: list[int] | None, tokenizer: Tokenizer) -> bool | None:
    """Say whether a teacher's ids of STRESS_TEXT are this tokenizer's; None if the teacher does not give them."""
    return None if ids is None else ids == ids_of(tokenizer, STRESS_TEXT)
