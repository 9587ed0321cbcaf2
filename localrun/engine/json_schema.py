"""Hold an answer to a JSON schema, with llguidance: after each token it says which ones may come next.

A schema that a grammar cannot enforce is refused, never ignored: every answer that comes out validates. The answers
are narrower than the schema where that costs nothing: properties come in the schema's order, and white space is what
printers usually write, a space or a new line with its indentation, since small models lose themselves in more.

llama.cpp's own converter of schemas lets raw newlines into strings, loses the backslashes of constants, confuses
references that end alike, and silently drops bounds.

Source: https://github.com/guidance-ai/llguidance, docs/json_schema.md.
"""

from __future__ import annotations

import json
import re
import warnings
from typing import Any
from weakref import WeakKeyDictionary

from llguidance import LLMatcher, LLTokenizer
from llguidance.llamacpp import lltokenizer_from_vocab

from ...errors import ModelError, UsageError
from .llama import Model

_WRITING = {"x-guidance": {"whitespace_pattern": r"( |\n[ \t]{0,20})"}}
_tokenizers: WeakKeyDictionary[Model, LLTokenizer] = WeakKeyDictionary()  # one takes up to a second to make


class SchemaConstraint:
    """The tokens that may come next by a JSON schema, which was checked before."""

    def __init__(self, model: Model, schema: str, *, after_thinking: bool) -> None:
        """Begin an answer; the blank line after the thinking may come first."""
        if model not in _tokenizers:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # it calls a function by its old name
                _tokenizers[model] = lltokenizer_from_vocab(model.vocab, eos_token=sorted(model.eog))
        grammar = _grammar(schema, after_thinking=after_thinking)
        self._matcher = LLMatcher(_tokenizers[model], grammar, log_level=0)

    def restrict(self, candidates: Any) -> None:
        """Make the candidates impossible that may not come next.

        Raises:
            ModelError: code "schema-too-large": llguidance reached one of its limits.
        """
        import numpy as np

        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            raise ModelError(f"the JSON schema is too large: {self._matcher.get_error()}", code="schema-too-large")
        may_follow = np.unpackbits(bits, bitorder="little").astype(bool)
        candidates["logit"][~may_follow[candidates["id"]]] = -np.inf

    def accept(self, token: int) -> None:
        """Record a token that joined the answer."""
        self._matcher.consume_token(token)

    def close(self) -> None:
        """Free nothing: Python does."""


def check_schema(schema: str) -> None:
    """Refuse what a grammar cannot enforce.

    Raises:
        UsageError: code "schema-unsupported": it is not a schema, or has a keyword that cannot be enforced.
    """
    try:
        matcher = LLMatcher(LLTokenizer("byte"), _grammar(schema, after_thinking=False), log_level=0)
        matcher.compute_bitmask()  # finds what refers to itself
        fault = matcher.get_error().replace("NoExtensionBias", "no text fits it; does it refer to itself?")
    except RecursionError:  # of Python's reader
        fault = "it is nested too deeply"
    except ValueError as error:
        fault = f"it is not JSON: {error}"
    if fault:
        reason = re.sub(r"^.*failed to compile JSON schema: ", "", fault.splitlines()[0])
        hint = "leave it out, and check the answer afterwards"
        raise UsageError(f"the JSON schema cannot be enforced: {reason}", hint, code="schema-unsupported")


def _grammar(schema: str, *, after_thinking: bool) -> str:
    """Return a schema in llguidance's dialect of Lark.

    Raises:
        ValueError, RecursionError: it is not JSON.
    """
    document = json.loads(schema)
    document = {} if document is True else document
    document = document | _WRITING if isinstance(document, dict) else document
    start = "/\\n?\\n?/ answer" if after_thinking else "answer"
    return f"start: {start}\nanswer: %json {json.dumps(document)}"
