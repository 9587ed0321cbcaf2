"""What the package asks of a Hugging Face tokenizer, and no more."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from ..localrun.core.generation import Message


class Tokenizer(Protocol):
    """A tokenizer with its chat template, as `teachers.huggingface.loading.load_tokenizer` gives it."""

    chat_template: Any
    """Jinja source; None if it has none."""
    eos_token: Any
    pad_token: Any
    eos_token_id: Any
    pad_token_id: Any

    def __len__(self) -> int:
        """Return the number of tokens, added ones included."""
        ...

    def __call__(self, text: str, *, add_special_tokens: bool = True, return_offsets_mapping: bool = False) -> Any:
        """Return the text's `input_ids`, and each token's `offset_mapping` (first, last + 1 character) if wanted."""
        ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        """Return the text of token ids."""
        ...

    def apply_chat_template(
        self, conversation: Sequence[Message], *, add_generation_prompt: bool = False, tokenize: bool
    ) -> str:
        """Return the conversation as text (`tokenize=False`), with the opening of an answer if it is to be prompted."""
        ...

    def get_vocab(self) -> dict[str, int]:
        """Return every token's id."""
        ...

    def save_pretrained(self, save_directory: Path) -> Any:
        """Write the tokenizer's files into a checkpoint folder."""
        ...
