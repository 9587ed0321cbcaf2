"""Grammars are checked by llama.cpp's own parser, whose reasons are told."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from deepdistill.errors import UsageError
from deepdistill.localrun.engine.grammar import check_grammar
from deepdistill.localrun.engine.llama import Model


@pytest.fixture(scope="module")
def model(random_gguf: Path) -> Iterator[Model]:
    """A vocabulary in which every byte is a token."""
    loaded = Model(random_gguf)
    yield loaded
    loaded.close()


@pytest.mark.parametrize(
    ("gbnf", "said"),
    [
        ("", "expecting ::="),
        ('root = "a"', "expecting ::= at = "),
        ("root ::= x", "Undefined rule identifier 'x'"),
        ('yes ::= "a"', "does not contain a 'root' symbol"),
        ('root ::= root | "a"', "left recursion"),
        ('root ::= ("a"', "expecting ')' at the end of a line"),
        ("root ::= [a", "unexpected end of input"),
        ("root ::= " + "(" * 100_000, "too deeply"),
        ('root ::= "a"\0', "NUL"),
        ("root ::= \ud800", "parse"),
    ],
)
def test_a_grammar_that_does_not_parse_is_told(gbnf: str, said: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, check=lambda error: error.code == "grammar-broken" and said in error.message):
        check_grammar(gbnf)
    os.write(2, b"still there")
    assert capfd.readouterr().err == "still there"


def test_a_grammar_may_name_the_models_tokens(model: Model) -> None:
    gbnf = 'root ::= "a" <|im_end|>'.replace("<|im_end|>", "<[2]>")
    check_grammar(gbnf, model)
    with pytest.raises(UsageError, check=lambda error: error.code == "grammar-broken"):
        check_grammar('root ::= "a" <think>')
