"""Hugging Face's tokenizers, and the calls by which the package asks them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias, cast

from ..localrun.core.generation import Message
from ..localrun.families.template import render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tokenizer: TypeAlias = "PreTrainedTokenizerBase"


def prompt_of(tokenizer: Tokenizer, messages: Sequence[Message], *, asks: bool = True) -> str:
    """Return a conversation as the chat template renders it, with the opening of an answer if it `asks` for one.

    The text is transformers' own. transformers would let a template, which is foreign code, run without end.

    Raises:
        ModelError: `code` "no-chat-template" or "template-refused".
    """
    source = tokenizer.get_chat_template() if tokenizer.chat_template else None
    return render(source, messages, thinking=None, variables=tokenizer.special_tokens_map, asks=asks)


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the tokens of a text, to which no special ones are added."""
    return cast("list[int]", tokenizer(text, add_special_tokens=False).input_ids)


def text_of(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Return the text of tokens, special ones included: `<think>` may be one."""
    return cast(str, tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
