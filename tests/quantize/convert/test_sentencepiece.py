"""SentencePiece vocabularies: token ids of llama.cpp against Hugging Face's."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, trainers

from deepdistill.errors import ArtifactError, ModelError
from deepdistill.localrun.engine.engine import Engine
from deepdistill.localrun.gguf.header import read_gguf
from deepdistill.quantize.measure.proofs import STRESS
from deepdistill.quantize.release import quantize


@pytest.fixture
def copy(student: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "copy"
    shutil.copytree(student, folder)
    return folder


def sentencepiece(copy: Path, *, prefix: bool = False, complete: bool = True) -> None:
    """Turn a copy's tokenizer into one as Gemma's: BPE over characters, bytes to fall back on, every split a merge."""
    text = "".join(letter for letter in STRESS if letter.isascii()).replace(" ", "▁")
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    byte_tokens = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=390, special_tokens=["<unk>", *byte_tokens], show_progress=False)
    tokenizer.train_from_iterator([text * 3], trainer)
    read = json.loads(tokenizer.to_str())
    vocab = read["model"]["vocab"]
    if complete:
        made = [token for token in vocab if len(token) > 1 and token not in byte_tokens and token != "<unk>"]
        read["model"]["merges"] = [
            [token[:i], token[i:]]
            for token in made
            for i in range(1, len(token))
            if token[:i] in vocab and token[i:] in vocab
        ]
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prepend = {"type": "Prepend", "prepend": "▁"}
    read["normalizer"] = {"type": "Sequence", "normalizers": [prepend, replace]} if prefix else replace
    read["decoder"] = {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
        ],
    }
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<unused0>"]
    read["added_tokens"] = read["added_tokens"][:1] + [
        {
            "id": len(vocab) + i,
            "content": name,
            "special": name.startswith("<|"),
            "normalized": False,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
        }
        for i, name in enumerate(names)
    ]
    (copy / "tokenizer.json").write_text(json.dumps(read))


@pytest.mark.parametrize("prefix", [False, True])
def test_a_sentencepiece_vocabulary_gives_the_same_ids(copy: Path, tmp_path: Path, prefix: bool) -> None:
    AutoTokenizer = pytest.importorskip("transformers").AutoTokenizer
    sentencepiece(copy, prefix=prefix)
    quantize(copy, tmp_path / "out.gguf")
    metadata = read_gguf(tmp_path / "out.gguf").metadata
    assert metadata["tokenizer.ggml.model"] == "llama"
    assert metadata["tokenizer.ggml.add_space_prefix"] is prefix
    types = dict(zip(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"], strict=True))
    assert [types[name] for name in ("<unk>", "<0x0A>", "<|im_end|>", "<think>", "<unused0>", "e")] == [
        3,
        6,
        3,
        4,
        3,
        1,
    ]
    tokenizer = AutoTokenizer.from_pretrained(copy)
    with Engine(tmp_path / "out.gguf", n_ctx=64, n_threads=1) as engine:
        for text in (STRESS, *STRESS.split("\n"), STRESS.replace("\n", "<think>"), "  a  b<|im_end|>c d"):
            assert engine.tokenize(text) == tokenizer(text, add_special_tokens=False)["input_ids"], text


def test_merges_that_scores_cannot_stand_for_are_refused(copy: Path, tmp_path: Path) -> None:
    sentencepiece(copy, complete=False)
    with pytest.raises(ModelError, check=lambda error: error.code == "not-convertible"):
        quantize(copy, tmp_path / "out.gguf")


def test_scores_come_from_a_tokenizer_model(copy: Path, tmp_path: Path) -> None:
    sentencepiece(copy)
    vocab = json.loads((copy / "tokenizer.json").read_text())["model"]["vocab"]
    message = b""
    for i, token in enumerate(sorted(vocab, key=vocab.__getitem__)):
        text = token.encode()
        kind = 2 if i == 0 else 6 if 0 < i < 257 else 1
        body = b"\x0a" + bytes([len(text)]) + text + b"\x15" + struct.pack("<f", -float(i)) + b"\x18" + bytes([kind])
        message += b"\x0a" + bytes([len(body)]) + body
    (copy / "tokenizer.model").write_bytes(message + b"\x12\x03\x0a\x01x")  # a trainer's settings, which are skipped
    quantize(copy, tmp_path / "out.gguf")
    scores = read_gguf(tmp_path / "out.gguf").metadata["tokenizer.ggml.scores"]
    assert scores[257:380] == [-float(i) for i in range(257, 380)]
    (copy / "tokenizer.model").write_bytes(message[:-3])
    with pytest.raises(ArtifactError, check=lambda error: error.code == "tokenizer-broken"):
        quantize(copy, tmp_path / "out.gguf")
