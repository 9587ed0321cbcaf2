"""Turn tokenizer.json, a byte-level BPE or a SentencePiece vocabulary, into a GGUF's tokenizer metadata.

llama.cpp has a fixed list of pre-tokenizers, each under a name. The name is found by what tokenizer.json says the
pre-tokenizer does, not by a hash of sample tokens, so an added token or another vocabulary changes nothing. A
pre-tokenizer, normalizer or model that llama.cpp would run differently is refused.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from gguf import GGUFWriter, TokenType

from ...errors import ArtifactError, ModelError
from .architectures import use_llama_cpp
from .checkpoint import Checkpoint
from .sentencepiece import Vocabulary, is_sentencepiece, read_pieces, type_of

_GPT2 = ("byte-level", True)  # splits by GPT-2's pattern, then maps bytes to letters
_BYTES = ("byte-level", False)
_DIGITS = ("digits", True)
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = ("split", _WORDS % "{1,3}")
_QWEN2 = ("split", _WORDS % "")
_DEEPSEEK3 = (
    ("split", r"\p{N}{1,3}"),
    ("split", r"[一-龥぀-ゟ゠-ヿ]+"),
    (
        "split",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
)
# (steps, ignore_merges) -> llama.cpp's name
_PRE: dict[tuple[tuple[tuple[str, Any], ...], bool], str] = {
    ((_GPT2,), False): "gpt-2",
    ((_DIGITS, _GPT2), False): "smollm",
    ((_QWEN2, _BYTES), False): "qwen2",
    ((_LLAMA3, _BYTES), True): "llama-bpe",
    ((_LLAMA3, _BYTES), False): "smaug-bpe",  # the same pattern, merges never skipped
    ((*_DEEPSEEK3, _BYTES), False): "deepseek-v3",
}
_SPECIAL = ("bos", "eos", "unk", "pad")
_LONG_NAMES = {"unk": "unknown", "pad": "padding"}  # in a GGUF's keys


@dataclass(frozen=True, kw_only=True)
class Tokenizer(Vocabulary):
    """A tokenizer as the file has it. `notes` say where llama.cpp differs on rare text."""

    pre: str
    special_ids: dict[str, int]  # bos, eos, eot, unk, pad
    add_bos: bool
    add_eos: bool
    chat_template: str | None
    notes: tuple[str, ...]


def read_tokenizer(checkpoint: Checkpoint, n_vocab: int) -> Tokenizer:
    """Read a folder's tokenizer, padded with unused tokens to the rows of the embedding.

    Raises:
        ArtifactError: `code` "no-tokenizer", "tokenizer-broken", or "tokenizer-mismatch": it does not fit the model.
        ModelError: `code` "not-convertible": llama.cpp or this converter has no equal tokenizer.
    """
    folder, source = checkpoint.folder, _read_source(checkpoint)
    try:
        if is_sentencepiece(source):
            pre, vocabulary = "default", read_pieces(source, checkpoint.find("tokenizer.model"), n_vocab)
        else:
            pre, vocabulary = _pre_tokenizer(source, folder), _vocabulary(source, n_vocab)
        special_ids = _special_ids(checkpoint, {token: i for i, token in enumerate(vocabulary.tokens)})
        texts = {name: vocabulary.tokens[i] for name, i in special_ids.items()}
        add_bos, add_eos = _adds(source.get("post_processor"), checkpoint, texts)
        return Tokenizer(
            **vars(vocabulary),
            pre=pre,
            special_ids=special_ids,
            add_bos=add_bos,
            add_eos=add_eos,
            chat_template=chat_template(checkpoint),
            notes=_notes(source),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{folder}/tokenizer.json is broken: {error!r}", code="tokenizer-broken") from error


def _read_source(checkpoint: Checkpoint) -> dict[str, Any]:
    if source := checkpoint.json("tokenizer.json"):
        return source
    if checkpoint.find("tokenizer.model"):
        raise use_llama_cpp("a SentencePiece tokenizer (tokenizer.model)", checkpoint.folder)
    hint = "copy the tokenizer files from the base model"
    raise ArtifactError(f"{checkpoint.folder} has no tokenizer.json", hint, code="no-tokenizer")


def write_tokenizer(tokenizer: Tokenizer, writer: GGUFWriter) -> None:
    """Add a tokenizer to a file's metadata."""
    writer.add_tokenizer_model("llama" if tokenizer.scores else "gpt2")
    writer.add_tokenizer_pre(tokenizer.pre)
    writer.add_token_list(tokenizer.tokens)
    if tokenizer.scores:
        writer.add_token_scores(tokenizer.scores)
    writer.add_token_types(tokenizer.types)
    writer.add_token_merges(tokenizer.merges)
    for name, token_id in tokenizer.special_ids.items():
        writer.add_uint32(f"tokenizer.ggml.{_LONG_NAMES.get(name, name)}_token_id", token_id)
    # Written even if false: llama.cpp puts a BOS before Llama 3's text unless told not to.
    writer.add_add_bos_token(tokenizer.add_bos)
    writer.add_add_eos_token(tokenizer.add_eos)
    writer.add_add_space_prefix(tokenizer.space_prefix)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _pre_tokenizer(source: dict[str, Any], folder: object) -> str:
    """Return llama.cpp's name of a byte-level BPE's pre-tokenizer."""
    model, normalizer = source["model"], source.get("normalizer")
    if model.get("type") != "BPE":
        raise use_llama_cpp(f"a {model.get('type')} tokenizer", folder)
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise use_llama_cpp("a BPE tokenizer with word affixes", folder)
    if normalizer and normalizer.get("type") != "NFC":
        raise use_llama_cpp(f"a tokenizer with the normalizer {normalizer.get('type')}", folder)
    steps = tuple(_steps(source.get("pre_tokenizer")))
    pre = _PRE.get((steps, bool(model.get("ignore_merges"))))
    if pre is None:
        raise use_llama_cpp(f"a tokenizer with the pre-tokenizer {_describe(steps)}", folder)
    return pre


def _steps(pre_tokenizer: dict[str, Any] | None) -> list[tuple[str, Any]]:
    """Return a pre-tokenizer as comparable steps; an unknown one keeps its name, which matches nothing."""
    if pre_tokenizer is None:
        return []
    kind = pre_tokenizer.get("type")
    if kind == "Sequence":
        return [step for part in pre_tokenizer["pretokenizers"] for step in _steps(part)]
    if kind == "ByteLevel" and not pre_tokenizer.get("add_prefix_space"):
        return [("byte-level", bool(pre_tokenizer.get("use_regex", True)))]
    if kind == "Digits":
        return [("digits", bool(pre_tokenizer.get("individual_digits")))]
    is_plain = pre_tokenizer.get("behavior") == "Isolated" and not pre_tokenizer.get("invert")
    if kind == "Split" and is_plain and "Regex" in pre_tokenizer["pattern"]:
        return [("split", pre_tokenizer["pattern"]["Regex"])]
    return [(str(kind), json.dumps({name: value for name, value in pre_tokenizer.items() if name != "type"}))]


def _describe(steps: tuple[tuple[str, Any], ...]) -> str:
    return " + ".join(f"{kind}({value})" for kind, value in steps) or "none"


def _vocabulary(source: dict[str, Any], n_vocab: int) -> Vocabulary:
    """Return a byte-level BPE's n_vocab tokens and its merges; ids without a token are unused."""
    tokens = [f"[PAD{i}]" for i in range(n_vocab)]
    types = [int(TokenType.UNUSED)] * n_vocab
    added = {entry["id"]: entry for entry in source.get("added_tokens") or []}
    known = {i: token for token, i in source["model"]["vocab"].items()}
    known |= {i: entry["content"] for i, entry in added.items()}
    if known and max(known) >= n_vocab:
        raise ArtifactError(
            f"the tokenizer has token {max(known)}, but the model has {n_vocab} embeddings",
            "the tokenizer belongs to another checkpoint, or resize_token_embeddings was not called",
            code="tokenizer-mismatch",
        )
    for i, token in known.items():
        tokens[i], types[i] = token, int(type_of(added[i]) if i in added else TokenType.NORMAL)
    return Vocabulary(tokens, types, merges=_merges(source["model"]["merges"]))


def _merges(merges: list[Any]) -> list[str]:
    """Return merges as `left right`; a space within a part would end it, so it becomes byte-level BPE's Ġ."""
    return [merge if isinstance(merge, str) else " ".join(part.replace(" ", "Ġ") for part in merge) for merge in merges]


def _special_ids(checkpoint: Checkpoint, ids: dict[str, int]) -> dict[str, int]:
    """Return the ids of bos, eos, unk and pad; a second end that generation_config.json names becomes eot."""
    named = checkpoint.json("tokenizer_config.json")
    generation = checkpoint.json("generation_config.json")
    found: dict[str, int] = {}
    for name in _SPECIAL:
        text = named.get(f"{name}_token")
        text = text.get("content") if isinstance(text, dict) else text
        fallback = generation.get(f"{name}_token_id", checkpoint.config.get(f"{name}_token_id"))
        fallback = fallback[0] if isinstance(fallback, list) and fallback else fallback
        if isinstance(text, str) and text in ids:
            found[name] = ids[text]
        elif not named and isinstance(fallback, int) and 0 <= fallback < len(ids):
            found[name] = fallback
    ends = generation.get("eos_token_id", checkpoint.config.get("eos_token_id"))
    others = [i for i in (ends if isinstance(ends, list) else [ends]) if isinstance(i, int) and i != found.get("eos")]
    if others and "eos" in found:
        found["eot"] = others[0]
    elif others:
        found["eos"] = others[0]
    return found


def _adds(processor: dict[str, Any] | None, checkpoint: Checkpoint, texts: dict[str, str]) -> tuple[bool, bool]:
    """Say whether text gets a BOS in front and an EOS behind; tokenizer_config.json wins if it says so.

    `texts` has the special tokens' texts by name.
    """
    first = last = None
    for part in (processor or {}).get("processors") or [processor or {}]:
        if part.get("type") == "TemplateProcessing":
            outer = [piece.get("SpecialToken", {}).get("id") for piece in part["single"]]
            first, last = (outer[0], outer[-1]) if len(outer) > 1 else (None, None)
        elif part and part.get("type") != "ByteLevel":
            raise use_llama_cpp(f"a tokenizer with the post-processor {part.get('type')}", checkpoint.folder)
    for text, name in ((first, "bos"), (last, "eos")):
        if text is not None and text != texts.get(name):
            raise ModelError(
                f"the tokenizer puts {text} where a GGUF can only have its {name} token ({texts.get(name)})",
                f"set {name}_token in {checkpoint.folder}/tokenizer_config.json",
                code="not-convertible",
            )
    config = checkpoint.json("tokenizer_config.json")
    stated = (config.get("add_bos_token"), config.get("add_eos_token"))
    add_bos, add_eos = (
        value if isinstance(value, bool) else text is not None
        for value, text in zip(stated, (first, last), strict=True)
    )
    return add_bos and "bos" in texts, add_eos and "eos" in texts


def chat_template(checkpoint: Checkpoint) -> str | None:
    """Return a folder's (default) chat template, from chat_template.jinja or tokenizer_config.json."""
    if path := checkpoint.find("chat_template.jinja"):
        return path.read_text(encoding="utf-8")
    found = checkpoint.json("tokenizer_config.json").get("chat_template")
    if isinstance(found, list):
        found = {entry.get("name"): entry.get("template") for entry in found}.get("default")
    return found if isinstance(found, str) else None


def _notes(source: dict[str, Any]) -> tuple[str, ...]:
    notes = []
    if (source.get("normalizer") or {}).get("type") == "NFC":
        notes.append("llama.cpp does not compose Unicode (NFC) as this tokenizer does, so decomposed accents differ")
    trimmed = [e["content"] for e in source.get("added_tokens") or [] if e.get("lstrip") or e.get("rstrip")]
    if trimmed:
        notes.append(f"llama.cpp keeps the spaces beside {', '.join(trimmed[:3])}, which this tokenizer drops")
    return tuple(notes)
