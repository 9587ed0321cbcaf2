"""Hugging Face's tokenizers, and the calls by which the package asks them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias, cast

from ..localrun.core.generation import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tokenizer: TypeAlias = "PreTrainedTokenizerBase"


def prompt_of(tokenizer: Tokenizer, messages: Sequence[Message]) -> str:
    """Return a conversation as the chat template renders it, with the opening of an answer."""
    return cast(str, tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False))


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the tokens of a text, to which no special ones are added."""
    return cast("list[int]", tokenizer(text, add_special_tokens=False).input_ids)


def text_of(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Return the text of tokens, special ones included: `<think>` may be one."""
    return cast(str, tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
