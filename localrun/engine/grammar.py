"""GBNF, the grammars that llama.cpp samples under: check one, and build the expressions that JSON is made of.

Source: https://github.com/ggml-org/llama.cpp/blob/master/grammars/README.md
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, BinaryIO

from ...errors import UsageError
from .library import clear_log, llama_cpp, logged_reason, start_library
from .llama import Model

MOST_TIMES = 2000  # llama.cpp counts no further: it takes a larger bound for none
_MOST_NESTED = 1000  # parentheses: its parser recurses
_N_DIGITS = 16  # of an unbounded number: a double holds no more
_HINT = 'GBNF: rules like  root ::= "yes" | "no"'

PRIMITIVES = {  # name: (rule, the rules that it needs)
    "space": (r'| " " | "\n" [ \t]{0,20}', ()),
    "boolean": ('"true" | "false"', ()),
    "null": ('"null"', ()),
    "integer": ('"-"? ("0" | [1-9] [0-9]{0,15})', ()),
    "number": ('"-"? ("0" | [1-9] [0-9]{0,15}) ("." [0-9]{1,16})? ([eE] [-+]? [0-9]{1,2})?', ()),
    "string": (r'"\"" char* "\""', ("char",)),
    # \u excludes surrogates: half a pair is not a character, and a pair would count as two.
    "char": (r'[^"\\\x00-\x1F] | "\\" (["\\/bfnrt] | "u" ([0-9a-ce-fA-CE-F] hex | [dD] [0-7] hex) hex hex)', ("hex",)),
    "hex": ("[0-9a-fA-F]", ()),
    "value": (
        "object | array | string | number | boolean | null",
        ("object", "array", "string", "number", "boolean", "null"),
    ),
    "object": (
        '"{" space (string ":" space value ("," space string ":" space value)* space)? "}"',
        ("space", "string", "value"),
    ),
    "array": ('"[" space (value ("," space value)* space)? "]"', ("space", "value")),
}


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


def literal(value: Any) -> str:
    """Return a value's JSON text as a quoted literal of the grammar."""
    text = json.dumps(value, ensure_ascii=False)
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def times(low: int, high: int | None) -> str:
    """Return the suffix that repeats an expression low to high times."""
    return f"{{{low},{'' if high is None else high}}}"


def separated(item: str, space: str, *, low: int, high: int | None) -> str:
    """Return an expression for low to high items with commas between them; high is at least 1."""
    more = times(max(low - 1, 0), None if high is None else high - 1)
    return f'({item} ("," {space} {item}){more}){"" if low else "?"}'


def whole_numbers(low: int | None, high: int | None) -> str:
    """Return an expression for the integers from low to high."""
    return _signed(_naturals, 1, low=low, high=high)


def decimal_numbers(low: int | None, high: int | None) -> str:
    """Return an expression for the decimal numbers from low to high."""
    return _signed(_decimals, 0, low=low, high=high)


def _signed(magnitudes: Callable[[int, int], str], smallest: int, *, low: int | None, high: int | None) -> str:
    """Return the numbers from low to high; `smallest` is the least magnitude that may follow a minus."""
    most = 10 ** max(_N_DIGITS, *(len(str(bound)) for bound in (low, high))) - 1
    low, high = -most if low is None else low, most if high is None else high
    negative = [f'"-" {magnitudes(max(-high, smallest), -low)}'] if low < 0 else []
    positive = [magnitudes(max(low, 0), high)] if high >= 0 else []
    return f"({' | '.join(negative + positive)})"


def _decimals(low: int, high: int) -> str:
    exact = f'"{high}" ("." "0"{{1,{_N_DIGITS}}})?'
    below = [f'{_naturals(low, high - 1)} ("." [0-9]{{1,{_N_DIGITS}}})?'] if high > low else []
    return f"({' | '.join([*below, exact])})"


def _naturals(low: int, high: int) -> str:
    """Return the natural numbers from low to high, one alternative for each number of digits."""
    lengths = range(len(str(low)), len(str(high)) + 1)
    spans = [(max(low, 10 ** (n - 1) if n > 1 else 0), min(high, 10**n - 1)) for n in lengths]
    return f"({' | '.join(_same_length(str(first), str(last)) for first, last in spans)})"


def _same_length(low: str, high: str) -> str:
    """Return the digit strings from low to high, which have the same length."""
    n = len(low)
    if low == high:
        return f'"{low}"'
    if low == "0" * n and high == "9" * n:
        return f"[0-9]{{{n}}}"
    if low[0] == high[0]:
        return f'"{low[0]}" {_same_length(low[1:], high[1:])}'
    first, last, ends = int(low[0]), int(high[0]), []
    if low[1:].strip("0"):
        ends.append(f'"{first}" {_same_length(low[1:], "9" * (n - 1))}')
        first += 1
    if high[1:].strip("9"):
        ends.append(f'"{last}" {_same_length("0" * (n - 1), high[1:])}')
        last -= 1
    middle = [f"[{first}-{last}]" + (f" [0-9]{{{n - 1}}}" if n > 1 else "")] if first <= last else []
    return f"({' | '.join(middle + ends)})"


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
