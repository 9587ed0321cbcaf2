"""GBNF, the grammars that llama.cpp samples under: check one, and hold the tokens of an answer to it.

Source: https://github.com/ggml-org/llama.cpp/blob/master/grammars/README.md
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, BinaryIO

from ...errors import UsageError
from .library import clear_log, llama_cpp, logged_reason, start_library
from .llama import Model

_MOST_NESTED = 1000  # parentheses: llama.cpp's parser recurses
_HINT = 'GBNF: rules like  root ::= "yes" | "no"'
_ROOT = "deepdistill-root"  # a blank line after the thinking, then the grammar's own root


class GrammarConstraint:
    """The tokens that may come next by a grammar, which was checked before."""

    def __init__(self, model: Model, gbnf: str, *, after_thinking: bool) -> None:
        """Begin at the grammar's root; the blank line after the thinking may come first."""
        text, root = f"{_ROOT} ::= [\\n]? [\\n]? root\n{gbnf}", _ROOT if after_thinking else "root"
        self._sampler = llama_cpp.llama_sampler_init_grammar(model.vocab, text.encode(), root.encode())
        assert self._sampler, "the grammar was not checked"

    def restrict(self, candidates: Any) -> None:
        """Make the candidates impossible that may not come next."""
        llama_cpp.llama_sampler_apply(self._sampler, ctypes.byref(as_array(candidates)))

    def accept(self, token: int) -> None:
        """Record a token that joined the answer."""
        llama_cpp.llama_sampler_accept(self._sampler, token)

    def close(self) -> None:
        """Free the grammar. More than one call does no harm."""
        if self._sampler:
            llama_cpp.llama_sampler_free(self._sampler)
        self._sampler = None


def as_array(candidates: Any) -> Any:
    """Return numpy's array of candidates as llama.cpp's samplers take it: they write into it."""
    data = candidates.ctypes.data_as(ctypes.POINTER(llama_cpp.llama_token_data))
    return llama_cpp.llama_token_data_array(data=data, size=len(candidates), selected=-1, sorted=False)


def check_grammar(gbnf: str, model: Model | None = None) -> None:
    """Let llama.cpp parse a grammar; one that names tokens, such as `<think>`, needs the model that has them.

    Raises:
        UsageError: code "grammar-broken": it does not parse, or has no `root`; the reason is llama.cpp's own.
    """
    nesting = accumulate(1 if bracket == "(" else -1 for bracket in re.findall("[()]", gbnf))
    if max(nesting, default=0) > _MOST_NESTED:
        raise _broken("its parentheses are nested too deeply")
    if "\0" in gbnf:
        raise _broken("it holds a NUL character")
    start_library()
    clear_log()
    with _stderr_kept() as kept:
        text = gbnf.strip() or "nothing"  # without a text llama.cpp makes a sampler that allows everything
        sampler = llama_cpp.llama_sampler_init_grammar(model and model.vocab, text.encode("utf-8", "replace"), b"root")
        kept.seek(0)
        found = re.search(r"error parsing grammar: (.{1,100})", kept.read().decode("utf-8", "replace"))
    if not sampler:
        reason = re.sub(r" at$", " at the end of a line", found[1].strip()) if found else logged_reason()
        raise _broken(reason)
    llama_cpp.llama_sampler_free(sampler)


def _broken(reason: str) -> UsageError:
    return UsageError(f"the grammar does not parse: {reason}", _HINT, code="grammar-broken")


_capturing = threading.Lock()


@contextmanager
def _stderr_kept() -> Iterator[BinaryIO]:
    """Redirect what C code writes to stderr into a file: the parser tells its reason nowhere else."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as kept, _capturing:
        saved = os.dup(2)
        os.dup2(kept.fileno(), 2)
        try:
            yield kept
        finally:
            os.dup2(saved, 2)
            os.close(saved)
