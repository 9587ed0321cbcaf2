"""Write a checkpoint's tokenizer into a GGUF: tokens, merges, types, special ids, chat template, pre-tokenizer.

A byte-level BPE needs the name of its pre-tokenizer, which no checkpoint gives. It is measured, not looked up: the first
of llama.cpp's own that cuts a stress text exactly as the checkpoint's tokenizer does. If none does, there is no file.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import gguf
from tokenizers import Tokenizer

from ..errors import ArtifactError, ModelError
from ..localrun.ggml import VocabOnly

PRE_TOKENIZERS = ("smollm", "qwen2", "llama-bpe", "gpt-2", "deepseek-v3", "gpt-4o", "tekken", "deepseek-llm", "olmo")

STRESS_TEXT = (
    "Hello, world! It's 3.14159 or 1234567890; isn't it? I'll say we've 12 apples -- 7*8=56, (5-47)=-42.\n"
    "\n\n  Two  spaces, a\ttab,\t\ttabs and trailing   \n\r\n    def f(x):\n        return x[-1] // 2  # ünïcödé\n\n\n"
    "Ελληνικά Русский 中文字符 日本語テキスト 한국어 עברית العربية हिन्दी ไทย 🙂🏽👩‍👩‍👧 é é ½ ² Ⅷ ٣ "
    "CamelCase snake_case kebab-case $100 50% <tag attr=\"v\"> </think> 'S 'T don'T we'LL 1st 2nd 3rd \u00a0nbsp\u200bzw "
    'a+b=c a + b = c 12+30=42\n42-47=-(47-42)=-5\n\n(x)\n\n+1 ... !!! ?! \\n {"k": [1, 2.5e-3, null]}\n'
)
"""Everything that pre-tokenizers differ in: digits, contractions, white space, punctuation, scripts, emoji."""

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = (
    gguf.TokenType.NORMAL,
    gguf.TokenType.CONTROL,
    gguf.TokenType.USER_DEFINED,
    gguf.TokenType.UNUSED,
)


class Vocabulary:
    """A checkpoint's tokenizer, ready to be written for a model of n_vocab rows."""

    def __init__(self, folder: Path, config: dict[str, Any], n_vocab: int) -> None:
        """Read a tokenizer folder and find its pre-tokenizer.

        Raises:
            ArtifactError: there is no tokenizer, or it is broken.
            ModelError: it is no byte-level BPE, or none of llama.cpp's pre-tokenizers cuts text as it does.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ArtifactError(f"{folder} has no tokenizer.json", "copy the tokenizer's files from the base model")
        try:
            self._json = json.loads(path.read_text(encoding="utf-8"))
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exceptions
            raise ArtifactError(f"{path} is broken: {error}") from error
        model = self._json["model"]
        if model.get("type") != "BPE" or model.get("byte_fallback"):
            raise ModelError(
                f"{folder} has a {model.get('type')} tokenizer of SentencePiece's kind; only byte-level BPE is converted",
                "use llama.cpp's convert_hf_to_gguf.py for this model",
            )
        self._config = _read_json(folder / "tokenizer_config.json")
        self._generation = _read_json(folder / "generation_config.json")
        self._model_config = config
        self.chat_template = _chat_template(folder, self._config)
        self.tokens, self.types = self._tokens(n_vocab)
        self.merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
        self.special = self._special_ids()
        self.pre = self._find_pre_tokenizer(folder)

    def _tokens(self, n_vocab: int) -> tuple[list[str], list[gguf.TokenType]]:
        """Return the token of every row of the embedding and its type; rows that no token uses are padded."""
        by_id = {index: token for token, index in self.tokenizer.get_vocab(with_added_tokens=True).items()}
        if by_id and max(by_id) >= n_vocab:
            raise ModelError(
                f"the tokenizer has {max(by_id) + 1} tokens and the model {n_vocab} rows", "it is another model's"
            )
        added = {entry["id"]: entry for entry in self._json.get("added_tokens", [])}
        tokens, types = [], []
        for index in range(n_vocab):
            token = by_id.get(index)
            if token is None:
                tokens.append(f"[PAD{index}]")
                types.append(_UNUSED)
            else:
                tokens.append(token)
                types.append(_NORMAL if index not in added else _CONTROL if added[index]["special"] else _USER_DEFINED)
        return tokens, types

    def _special_ids(self) -> dict[str, int]:
        """Return the ids of bos, eos, pad and unk; EOS is what the generation config stops at first."""
        ids: dict[str, int] = {}
        for name in ("bos", "eos", "pad", "unk"):
            token = self._config.get(f"{name}_token")
            token = token.get("content") if isinstance(token, dict) else token
            index = self.tokenizer.token_to_id(token) if token else None
            if name == "eos":
                stops = self._generation.get("eos_token_id", index)
                index = (index if index in stops else stops[0]) if isinstance(stops, list) else stops
            if index is not None:
                ids[name] = index
        return ids

    def _find_pre_tokenizer(self, folder: Path) -> str:
        wanted = self.tokenizer.encode(STRESS_TEXT, add_special_tokens=False).ids
        with tempfile.TemporaryDirectory() as temporary:
            for pre in PRE_TOKENIZERS:
                path = Path(temporary) / "vocabulary.gguf"
                writer = gguf.GGUFWriter(path, "llama")
                _add_minimal_llama(writer, len(self.tokens))
                self.write(writer, pre)
                writer.write_header_to_file()
                writer.write_kv_data_to_file()
                writer.write_tensors_to_file()
                writer.close()
                vocabulary = VocabOnly(path)
                same = vocabulary.tokenize(STRESS_TEXT) == wanted
                vocabulary.close()
                if same:
                    return pre
        raise ModelError(
            f"no pre-tokenizer of this llama.cpp cuts text as the tokenizer in {folder} does",
            "use llama.cpp's convert_hf_to_gguf.py for this model",
        )

    def write(self, writer: gguf.GGUFWriter, pre: str | None = None) -> None:
        """Add the tokenizer's metadata to a GGUF."""
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre or self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        writer.add_token_merges(self.merges)
        for name, index in self.special.items():
            getattr(writer, {"unk": "add_unk_token_id"}.get(name, f"add_{name}_token_id"))(index)
        writer.add_add_bos_token(self._adds_bos())
        if self.chat_template:
            writer.add_chat_template(self.chat_template)

    def _adds_bos(self) -> bool:
        """Say whether the tokenizer itself puts BOS before a text."""
        ids = self.tokenizer.encode("a").ids
        return "bos" in self.special and ids[:1] == [self.special["bos"]]


def _add_minimal_llama(writer: gguf.GGUFWriter, n_vocab: int) -> None:
    """Add the keys without which llama.cpp reads no vocabulary."""
    writer.add_vocab_size(n_vocab)
    writer.add_context_length(512)
    writer.add_embedding_length(64)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
    except ValueError as error:
        raise ArtifactError(f"{path} is broken: {error}") from error


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several by name
        template = next((t["template"] for t in template if t["name"] == "default"), None)
    return template
