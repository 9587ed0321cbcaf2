"""SentencePiece vocabularies, such as Gemma's: a BPE over characters with a byte fallback, and a score for each token.

llama.cpp joins the neighbours whose joint token scores highest; Hugging Face's tokenizers follow a list of merges. The
scores come from tokenizer.model if there is one. Otherwise they are the merges' ranks, after a check that both methods
agree: every way to split a token must be a merge, and the merges of a token must follow each other. A BPE that was
trained with merges alone does not pass.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gguf import TokenType

from ...errors import ArtifactError, ModelError

_SPACE = "▁"
_UNUSED_SCORE, _ADDED_SCORE = -10000.0, -1000.0  # as in llama.cpp's converter
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
_PREPEND = {"type": "Prepend", "prepend": _SPACE}
_PLAIN_SPLIT = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}


@dataclass(frozen=True)
class Vocabulary:
    """Tokens and their types, with the scores of a SentencePiece vocabulary or the merges of a byte-level BPE.

    `space_prefix` says whether the tokenizer puts a space before every text.
    """

    tokens: list[str]
    types: list[int]
    scores: list[float] = field(default_factory=list)
    merges: list[str] = field(default_factory=list)
    space_prefix: bool = False


def is_sentencepiece(source: dict[str, Any]) -> bool:
    """Say whether tokenizer.json has a BPE over characters with a byte fallback."""
    return bool(source["model"].get("type") == "BPE" and source["model"].get("byte_fallback"))


def type_of(added: dict[str, Any]) -> TokenType:
    """Return the type of an added token of tokenizer.json.

    llama.cpp looks for turn ends among the control tokens only, and some models mark theirs as ordinary.

    Source: llama.cpp, conversion/base.py, does_token_look_special.
    """
    token, ends = added["content"], (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))
    is_special = added.get("special") or token in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
    is_special = is_special or any(token.startswith(first) and token.endswith(last) for first, last in ends)
    return TokenType.CONTROL if is_special else TokenType.USER_DEFINED


def read_pieces(source: dict[str, Any], model: Path | None, n_vocab: int) -> Vocabulary:
    """Return a vocabulary of n_vocab tokens from tokenizer.json, and its scores from tokenizer.model if there is one.

    Raises:
        ArtifactError: `code` "tokenizer-broken" or "tokenizer-mismatch".
        ModelError: `code` "not-convertible": llama.cpp would tokenize differently.
    """
    space_prefix = _space_prefix(source)
    found = list(_of_model(model)) if model else list(_of_merges(source["model"]))
    tokens = [f"[PAD{i}]" for i in range(n_vocab)]
    scores, types = [_UNUSED_SCORE] * n_vocab, [int(TokenType.UNUSED)] * n_vocab
    for i, (token, score, kind) in enumerate(found[:n_vocab]):
        if token is not None:
            tokens[i], scores[i], types[i] = token, score, kind
    for entry in source.get("added_tokens") or []:
        i, text = entry["id"], entry["content"]
        if i >= n_vocab:
            message = f"the tokenizer has token {i}, but the model has {n_vocab} embeddings"
            raise ArtifactError(message, "copy the tokenizer files from the base model", code="tokenizer-mismatch")
        types[i], scores[i] = int(type_of(entry)), _ADDED_SCORE
        tokens[i] = text if types[i] == TokenType.CONTROL else text.replace(_SPACE, " ")
    return Vocabulary(tokens, types, scores, space_prefix=space_prefix)


def _space_prefix(source: dict[str, Any]) -> bool:
    """Check that spaces become ▁ and that text is not cut in another way; say whether a ▁ is put in front."""
    normalizer = source.get("normalizer") or {}
    steps = normalizer.get("normalizers", [normalizer]) if normalizer else []
    if steps not in ([_REPLACE], [_PREPEND, _REPLACE]):
        raise _not_convertible(f"with the normalizer {normalizer.get('type')}")
    if source.get("pre_tokenizer") not in (None, _PLAIN_SPLIT):
        raise _not_convertible("that cuts text into words")
    return _PREPEND in steps


def _not_convertible(what: str) -> ModelError:
    message = f"deepdistill cannot convert a SentencePiece tokenizer {what}"
    return ModelError(message, "llama.cpp's convert_hf_to_gguf.py may know it", code="not-convertible")


def _of_merges(model: dict[str, Any]) -> Iterator[tuple[str | None, float, int]]:
    """Yield each token with its merges' rank as the score.

    Raises:
        ModelError: `code` "not-convertible": no scores do what these merges do.
    """
    vocab: dict[str, int] = model["vocab"]
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    joined = [token for token, _ in itertools.groupby(left + right for left, right in merges)]
    known = set(merges)
    is_complete = all(
        (token[:i], token[i:]) in known
        for token in vocab
        for i in range(1, len(token))
        if token[:i] in vocab and token[i:] in vocab and not _is_byte(token)
    )
    if len(set(joined)) != len(joined) or not is_complete:
        raise ModelError(
            "llama.cpp's SentencePiece needs scores, and no scores give the same tokens as this tokenizer's merges",
            "put the tokenizer.model that it was made from beside tokenizer.json",
            code="not-convertible",
        )
    yield from _scored(model, {token: -float(rank) for rank, token in enumerate(joined)})


def _scored(model: dict[str, Any], ranks: dict[str, float]) -> Iterator[tuple[str | None, float, int]]:
    """Yield (token, score, type) by id; tokens that nothing merges into score below all others."""
    vocab: dict[str, int] = model["vocab"]
    texts = {i: token for token, i in vocab.items()}
    for i in range(max(texts) + 1):
        token = texts.get(i)
        if token is None:
            yield None, 0.0, 0
        elif _is_byte(token):
            yield token, 0.0, int(TokenType.BYTE)
        else:
            kind = TokenType.UNKNOWN if token == model.get("unk_token") else TokenType.NORMAL
            yield token, ranks.get(token, -float(len(ranks))), int(kind)


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _of_model(path: Path) -> Iterator[tuple[str | None, float, int]]:
    """Yield the pieces of a tokenizer.model, a protocol buffer whose field 1 repeats (text, score, type).

    Source: https://github.com/google/sentencepiece, src/sentencepiece_model.proto.
    """
    try:
        for field, value in _fields(path.read_bytes()):
            if field == 1:
                piece = dict(_fields(value))
                (score,) = struct.unpack("<f", piece.get(2, bytes(4)))
                kind = piece.get(3, int(TokenType.NORMAL))
                # llama.cpp takes a user-defined piece for an ordinary one, unless tokenizer.json adds it.
                kind = TokenType.NORMAL if kind == TokenType.USER_DEFINED else kind
                yield piece[1].decode("utf-8"), score, int(kind)
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, struct.error) as error:
        message = f"{path} is not a SentencePiece model: {error!r}"
        raise ArtifactError(message, "copy it again", code="tokenizer-broken") from error


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Yield (field number, value) of a protocol buffer's message: whole numbers, and everything else as bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        size, at = _varint(data, at) if kind == 2 else ({1: 8, 5: 4}[kind], at)
        if at + size > len(data):
            raise ValueError("it is cut short")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError("a number is garbage")
