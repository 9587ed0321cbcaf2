"""Token ids of llama.cpp against Hugging Face's, for every pre-tokenizer that is converted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deepdistill.errors import DeepDistillError, ModelError
from deepdistill.localrun.engine.engine import Engine
from deepdistill.localrun.gguf.header import read_gguf
from deepdistill.quantize.measure.proofs import STRESS
from deepdistill.quantize.release import quantize

PRE = ["gpt-2", "smollm", "qwen2", "llama-bpe", "smaug-bpe", "deepseek-v3"]


@pytest.fixture(scope="module", params=PRE)
def both(
    request: pytest.FixtureRequest, make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Any, Engine]]:
    AutoTokenizer = pytest.importorskip("transformers").AutoTokenizer
    folder = make_checkpoint(pre=request.param, num_hidden_layers=1)
    path = tmp_path_factory.mktemp("tokens") / "model.gguf"
    assert quantize(folder, path, ftype="F16").pre_tokenizer == request.param
    with Engine(path, n_ctx=64, n_threads=1) as engine:
        yield AutoTokenizer.from_pretrained(folder), engine


def test_a_stress_text_gives_the_same_ids(both: tuple[Any, Engine]) -> None:
    tokenizer, engine = both
    for text in (STRESS, *STRESS.split("\n"), STRESS.replace(" ", "<|im_start|>"), STRESS.replace("\n", "<think>")):
        assert engine.tokenize(text) == tokenizer(text)["input_ids"]


@settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(
        st.sampled_from(
            [*"ab sS'tTrReElLdDmM.,+-=()0123456789\n\r\t\"<|>_/éßПр你好🚀", "<think>", "<|im_end|>", "   "]
        ),
        min_size=1,
        max_size=40,
    ).map("".join)
)
def test_any_mixture_gives_the_same_ids(both: tuple[Any, Engine], text: str) -> None:
    tokenizer, engine = both
    assert engine.tokenize(text) == tokenizer(text)["input_ids"]


@pytest.fixture
def copy(student: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "copy"
    shutil.copytree(student, folder)
    return folder


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    read = json.loads(path.read_text())
    change(read)
    path.write_text(json.dumps(read))


def test_tokens_types_and_special_ids(student: Path, tmp_path: Path) -> None:
    AutoTokenizer = pytest.importorskip("transformers").AutoTokenizer
    quantize(student, tmp_path / "out.gguf")
    metadata = read_gguf(tmp_path / "out.gguf").metadata
    tokenizer = AutoTokenizer.from_pretrained(student)
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    assert len(tokens) == len(tokenizer) + 6
    assert all(tokens[i] == token for token, i in tokenizer.get_vocab().items())
    assert tokens[-1] == f"[PAD{len(tokens) - 1}]"
    assert types[-6:] == [5] * 6  # unused
    assert [types[tokens.index(name)] for name in ("<|im_end|>", "<think>", "a")] == [3, 4, 1]  # control, user-defined
    assert metadata["tokenizer.ggml.bos_token_id"] == tokenizer.bos_token_id
    assert metadata["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    assert metadata["tokenizer.ggml.padding_token_id"] == tokenizer.pad_token_id
    assert metadata["tokenizer.ggml.add_bos_token"] is False


def test_another_end_of_the_generation_config_ends_a_turn(copy: Path, tmp_path: Path) -> None:
    AutoTokenizer = pytest.importorskip("transformers").AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(copy)
    other = tokenizer.convert_tokens_to_ids("</think>")
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [tokenizer.eos_token_id, other]}))
    quantize(copy, tmp_path / "out.gguf")
    with Engine(tmp_path / "out.gguf", n_ctx=64) as engine:
        assert {tokenizer.eos_token_id, other} <= engine.eog


@pytest.mark.parametrize("where", ["post-processor", "tokenizer_config"])
def test_a_bos_is_put_in_front_where_the_tokenizer_does(copy: Path, tmp_path: Path, where: str) -> None:
    AutoTokenizer = pytest.importorskip("transformers").AutoTokenizer
    bos = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    template = {
        "type": "TemplateProcessing",
        "single": [bos, text],
        "pair": [bos, text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
    }
    if where == "post-processor":
        edit(copy / "tokenizer.json", lambda read: read.update(post_processor=template))
    else:
        edit(copy / "tokenizer_config.json", lambda read: read.update(add_bos_token=True))
    quantize(copy, tmp_path / "out.gguf")
    assert read_gguf(tmp_path / "out.gguf").metadata["tokenizer.ggml.add_bos_token"] is True
    with Engine(tmp_path / "out.gguf", n_ctx=64) as engine:
        ids = engine.tokenize("hello")
        assert ids[0] == 0
        if where == "post-processor":
            assert ids == AutoTokenizer.from_pretrained(copy)("hello")["input_ids"]


def test_the_template_may_stand_in_the_tokenizer_config(copy: Path, tmp_path: Path) -> None:
    (copy / "chat_template.jinja").unlink()
    edit(copy / "tokenizer_config.json", lambda read: read.update(chat_template="{{ messages }}"))
    quantize(copy, tmp_path / "out.gguf")
    metadata = read_gguf(tmp_path / "out.gguf").metadata
    assert metadata["tokenizer.chat_template"] == "{{ messages }}"
    assert "deepdistill.think_open" not in metadata


def test_a_normalizer_is_noted(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    report = quantize(make_checkpoint(pre="qwen2", num_hidden_layers=1), tmp_path / "out.gguf")
    assert any("NFC" in line for line in report.summary())


@pytest.mark.parametrize(
    ("change", "code", "named"),
    [
        (lambda t: t.update(pre_tokenizer={"type": "Whitespace"}), "not-convertible", "Whitespace"),
        (lambda t: t.update(pre_tokenizer=None), "not-convertible", "pre-tokenizer none"),
        (
            lambda t: t["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True),
            "not-convertible",
            "ByteLevel",
        ),
        (lambda t: t["model"].update(ignore_merges=True), "not-convertible", "digits"),
        (lambda t: t["model"].update(byte_fallback=True), "not-convertible", "normalizer None"),
        (lambda t: t["model"].update(type="Unigram"), "not-convertible", "Unigram"),
        (lambda t: t.update(normalizer={"type": "Lowercase"}), "not-convertible", "Lowercase"),
        (lambda t: t.update(post_processor={"type": "BertProcessing"}), "not-convertible", "BertProcessing"),
        (lambda t: t.pop("model"), "tokenizer-broken", "tokenizer.json"),
        (lambda t: t["model"]["vocab"].update(extra=9999), "tokenizer-mismatch", "9999"),
    ],
)
def test_what_llama_cpp_would_cut_otherwise_is_refused(
    copy: Path, tmp_path: Path, change: Callable[[dict[str, Any]], Any], code: str, named: str
) -> None:
    edit(copy / "tokenizer.json", change)
    with pytest.raises(DeepDistillError, check=lambda error: error.code == code) as caught:
        quantize(copy, tmp_path / "out.gguf")
    assert named in caught.value.message
    assert not (tmp_path / "out.gguf").exists()


def test_a_sentencepiece_model_is_sent_to_llama_cpp(copy: Path, tmp_path: Path) -> None:
    (copy / "tokenizer.json").unlink()
    (copy / "tokenizer.model").write_bytes(b"")
    with pytest.raises(ModelError, check=lambda error: error.code == "not-convertible") as caught:
        quantize(copy, tmp_path / "out.gguf")
    assert "convert_hf_to_gguf.py" in caught.value.hint
