"""What comes out of a schema's grammar validates, and what does not validate cannot come out of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from deepdistill.errors import UsageError
from deepdistill.localrun.core.generation import Guidance, Sampling
from deepdistill.localrun.engine.engine import Engine
from deepdistill.localrun.engine.json_schema import SchemaConstraint, check_schema
from deepdistill.localrun.engine.llama import Model

TREE = {
    "$ref": "#/$defs/node",
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "maxLength": 3},
                "children": {"type": "array", "maxItems": 2, "items": {"$ref": "#/$defs/node"}},
            },
            "required": ["name"],
        }
    },
}
# name: (schema, texts that have to fit, texts that must not). What must not fit need not break the schema: a grammar is
# narrower where that costs nothing.
CASES: dict[str, tuple[Any, list[str], list[str]]] = {
    "any": ({"description": "anything"}, ['{"a": [1, "é", null, -0.5e-3]}', "[]"], ["", "tru", '"\n"']),
    "true": (True, ["1"], ["x"]),
    "string": ({"type": "string"}, ['""', '"é🦙\\n\\"\\\\"'], ['"', '"\t"', '"\\x"', '"\\ud800"', '"a" ']),
    "lengths": (
        {"type": "string", "minLength": 2, "maxLength": 3},
        ['"ab"', '"é🦙"', '"\\néx"'],
        ['"a"', '"abcd"', '"\\ud83d\\ude00"'],
    ),
    "number": ({"type": "number"}, ["0", "-1.5", "1e10", "2.5E-3"], ["01", "1.", ".5", "+1", "NaN", "1e"]),
    "integer": ({"type": "integer"}, ["0", "-12"], ["1.5", "007", "--1"]),
    "boolean or null": ({"type": ["boolean", "null"]}, ["true", "false", "null"], ["True", "1"]),
    "enum": (
        {"enum": ['x"y', "a\\b", "\n", "é", 1, None, {"k": [1]}]},
        ['"x\\"y"', '"a\\\\b"', '"\\n"', '"é"', "1", "null", '{"k": [1]}'],
        ['"x"', "2", '"\n"'],
    ),
    "const": ({"const": "yes"}, ['"yes"'], ['"no"', "yes"]),
    "object": (
        {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "boolean"}, "c": {"type": "null"}},
            "required": ["b"],
            "additionalProperties": False,
        },
        ['{"b": true}', '{"a": 1, "b": false}', '{"b":true,"c":null}', '{\n  "a": 1,\n  "b": true,\n  "c": null\n}'],
        ["{}", '{"a": 1}', '{"b": true,}', '{, "b": true}', '{"b": true "c": null}', '{"b": true, "d": 1}'],
    ),
    "optional": (
        {"properties": {"a": {"type": "integer"}, "b": {"type": "integer"}, "c": {"type": "integer"}}},
        ["{}", '{"a": 1}', '{"b": 1}', '{"c": 1}', '{"a": 1, "c": 2}', '{"a": 1, "b": 2, "c": 3}', '{"b": 1, "c": 2}'],
        ['{"a": 1 "b": 2}', '{,"a": 1}', '{"a": 1,}', "{ "],
    ),
    "required, not described": ({"type": "object", "required": ["x"]}, ['{"x": [1]}'], ["{}", '{"y": 1}']),
    "no properties": ({"type": "object", "additionalProperties": False}, ["{}"], ['{"a": 1}']),
    "map": (
        {"type": "object", "additionalProperties": {"type": "integer"}},
        ["{}", '{"é": 1}', '{"a": 1, "b": 2}'],
        ['{"a": "b"}', '{"a": 1,}'],
    ),
    "items": (
        {"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 3},
        ["[1]", "[1, 2, 3]", "[\n  1,\n  2\n]"],
        ["[]", "[1, 2, 3, 4]", "[1,]", "[true]"],
    ),
    "at least two": ({"type": "array", "items": {"const": 1}, "minItems": 2}, ["[1, 1]", "[1,1,1,1]"], ["[1]", "[]"]),
    "none": ({"type": "array", "items": {"type": "integer"}, "maxItems": 0}, ["[]"], ["[1]"]),
    "any list": ({"type": "array"}, ["[]", '[1, "a", {}]'], ["{}"]),
    "tuple": (
        {"type": "array", "prefixItems": [{"type": "string"}, {"type": "integer"}], "minItems": 2, "maxItems": 2},
        ['["a", 1]'],
        ['["a"]', '["a", 1, 2]', '[1, "a"]'],
    ),
    "tuple and more": (
        {"prefixItems": [{"type": "string"}], "items": {"type": "integer"}, "minItems": 2, "maxItems": 3},
        ['["a", 1]', '["a", 1, 2]'],
        ['["a"]', '["a", 1, 2, 3]', '["a", "b"]'],
    ),
    "old tuple": (
        {"$schema": "http://json-schema.org/draft-07/schema#", "items": [{"type": "string"}], "additionalItems": False},
        ['["a"]'],
        ['["a", 1]', "[1]"],
    ),
    "any of": (
        {"anyOf": [{"type": "integer"}, {"type": "object", "properties": {"a": {"type": "null"}}, "required": ["a"]}]},
        ["3", '{"a": null}'],
        ["{}", '"3"'],
    ),
    "any of, with more beside it": (
        {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "anyOf": [{"required": ["a"]}, {"required": ["b"]}],
        },
        ['{"a": 1}', '{"b": 1}', '{"a": 1, "b": 2}'],
        ["{}"],
    ),
    "all of": (
        {
            "allOf": [
                {"$ref": "#/$defs/named"},
                {"properties": {"age": {"type": "integer", "minimum": 0}}, "required": ["age"]},
            ],
            "$defs": {"named": {"type": "object", "properties": {"name": {"const": "x"}}, "required": ["name"]}},
        },
        ['{"name": "x", "age": 1}'],
        ['{"name": "x"}', '{"age": 1}', '{"name": "x", "age": -1}'],
    ),
    "a reference with more beside it": (
        {"$ref": "#/$defs/n", "maximum": 5, "description": "small", "$defs": {"n": {"type": "integer", "minimum": 3}}},
        ["3", "5"],
        ["2", "6"],
    ),
    "references that end alike": (
        {
            "type": "array",
            "prefixItems": [{"$ref": "#/$defs/a/x"}, {"$ref": "#/$defs/b/x"}],
            "$defs": {"a": {"x": {"const": 1}}, "b": {"x": {"const": 2}}},
        },
        ["[1, 2]"],
        ["[1, 1]", "[2, 2]"],
    ),
    "tree": (
        TREE,
        ['{"name": "a"}', '{"name": "a", "children": [{"name": "b", "children": []}]}'],
        ['{"name": "abcd"}', '{"children": []}', '{"name": "a", "children": [1]}'],
    ),
    "keys that need escapes": (
        {
            "properties": {'a"b\\c': {"const": 1}, "é/~": {"$ref": "#/properties/a%22b%5Cc"}},
            "required": ['a"b\\c', "é/~"],
        },
        ['{"a\\"b\\\\c": 1, "é/~": 1}'],
        ['{"a"b\\c": 1, "é/~": 1}'],
    ),
    "fractions in bounds": (
        {"type": "number", "minimum": 0, "maximum": 1},
        ["0", "0.5", "1", "1.0", "0.0001"],
        ["1.1", "2", "-1", "-0.5", "1e1"],
    ),
    "fractions below zero": (
        {"type": "number", "minimum": -2, "maximum": -1},
        ["-1", "-1.5", "-2", "-2.00"],
        ["-2.1", "-0.9", "1", "0"],
    ),
    "exclusive": ({"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 2.5}, ["1", "2"], ["0", "3", "-1"]),
    "pattern": ({"type": "string", "pattern": "^a+b$"}, ['"aab"'], ['"b"', '"aa"']),
    "half a step": ({"type": "number", "minimum": 0.5, "exclusiveMaximum": 2}, ["0.5", "1.99"], ["0.4", "2"]),
    "multiples": ({"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 20}, ["0", "15"], ["3", "25"]),
    "a format": ({"type": "string", "format": "date"}, ['"2026-12-01"'], ['"now"', '"2026-13-01"']),
}  # fmt: skip


@pytest.fixture(scope="module")
def model(random_gguf: Path) -> Iterator[Model]:
    """A vocabulary in which every byte is a token."""
    loaded = Model(random_gguf)
    yield loaded
    loaded.close()


class Matcher:
    """A schema's constraint, asked token by token."""

    def __init__(self, model: Model, schema: Any, *, after_thinking: bool = False) -> None:
        text = json.dumps(schema)
        check_schema(text)
        self.model, self._constraint = model, SchemaConstraint(model, text, after_thinking=after_thinking)

    def allowed(self, tokens: list[int]) -> list[int]:
        """Return those of the tokens that may come next."""
        candidates = np.array([(token, 0.0) for token in tokens], [("id", "i4"), ("logit", "f4")])
        self._constraint.restrict(candidates)
        return [int(token) for token in candidates["id"][np.isfinite(candidates["logit"])]]

    def accept(self, token: int) -> None:
        self._constraint.accept(token)

    def fits(self, text: str) -> bool:
        """Say whether the schema lets a whole text through."""
        by_bytes = {self.model.piece(token): token for token in range(3, 3 + 256)}
        for byte in text.encode():
            token = by_bytes[bytes([byte])]
            if not self.allowed([token]):
                return False
            self.accept(token)
        return bool(self.allowed([min(self.model.eog)]))

    def walk(self, rng: np.random.Generator) -> str | None:
        """Return a text that the schema allows, or None if it grew too long; what ends things is favoured.

        Its letters are ASCII and é: a walk seldom finds the end of another character.
        """
        said, eog = b"", self.model.eog
        pieces = {token: self.model.piece(token) for token in range(self.model.n_vocab)}
        likely = [token for token, piece in pieces.items() if token in eog or piece in (b'"', b"}", b"]")]
        tokens = [
            token for token, piece in pieces.items() if token in eog or piece.isascii() or piece in (b"\xc3", b"\xa9")
        ]
        for _ in range(400):
            choice = self.allowed(tokens)
            weights = np.array([30.0 if token in likely else 1.0 for token in choice])
            token = int(rng.choice(choice, p=weights / weights.sum()))
            if token in self.model.eog:
                return said.decode()
            said += self.model.piece(token)
            self.accept(token)
        return None


@pytest.mark.parametrize("name", CASES)
def test_what_fits_and_what_does_not(name: str, model: Model) -> None:
    schema, fitting, others = CASES[name]
    for text in fitting:
        jsonschema.validate(json.loads(text), schema)  # the case itself is right
        assert Matcher(model, schema).fits(text), text
    for text in others:
        assert not Matcher(model, schema).fits(text), text


@pytest.mark.parametrize("name", CASES)
def test_whatever_comes_out_validates(name: str, model: Model) -> None:
    schema, n_whole = CASES[name][0], 0
    for seed in range(12):
        text = Matcher(model, schema).walk(np.random.default_rng(seed))
        if text is not None:
            jsonschema.validate(json.loads(text), schema)
            n_whole += 1
    assert n_whole >= 3


@pytest.mark.parametrize(
    ("low", "high"),
    [(0, 0), (0, 9), (3, 7), (0, 120), (7, 105), (-5, 5), (-120, -7), (-1, 0), (99, 101), (None, -3), (98, None)],
)
def test_integer_bounds_hold_exactly(low: int | None, high: int | None, model: Model) -> None:
    schema = (
        {"type": "integer"} | ({} if low is None else {"minimum": low}) | ({} if high is None else {"maximum": high})
    )
    wrong = []
    for number in [*range(-130, 131), 999, 1000, 12345, -1000, -12345]:
        inside = (low is None or number >= low) and (high is None or number <= high)
        if Matcher(model, schema).fits(str(number)) != inside:
            wrong.append(number)
    assert wrong == []


def test_a_blank_line_may_follow_the_thinking(model: Model) -> None:
    for text, after_thinking in (("\n\n1", True), ("1", True), ("1", False)):
        assert Matcher(model, {"const": 1}, after_thinking=after_thinking).fits(text)
    assert not Matcher(model, {"const": 1}).fits("\n1")
    assert not Matcher(model, {"const": 1}, after_thinking=True).fits("\n\n\n1")


@pytest.mark.parametrize(
    "schema",
    [
        "{",
        "[" * 100_000,
        [],
        False,
        {"type": "text"},
        {"properties": {"a": {"items": {"not": {}}}}},
        {"type": "array", "uniqueItems": True},
        {"type": "integer", "minimum": 3, "maximum": 2},
        {"type": "integer", "minimum": "3"},
        {"type": "string", "minLength": 3, "maxLength": 2},
        {"enum": []},
        {"enum": "abc"},
        {"anyOf": []},
        {"properties": []},
        {"$ref": "#/$defs/gone"},
        {"$ref": "https://example.org/a"},
        {"allOf": [{"type": "string"}, {"type": "integer"}]},
        {"if": {}},
        {"propertyNames": {"maxLength": 3}},
        {"unevaluatedProperties": False},
        {"dependentRequired": {}},
        {"contains": {}},
        {"allOf": [{"$ref": "#"}]},
        {"type": "string", "format": "mood"},
    ],
)  # fmt: skip
def test_what_cannot_be_held_is_refused(schema: Any) -> None:
    with pytest.raises(UsageError, check=lambda error: error.code == "schema-unsupported"):
        check_schema(schema if isinstance(schema, str) else json.dumps(schema))


def test_an_engine_holds_its_answer_to_a_schema(random_gguf: Path) -> None:
    """A random model, whose own words are noise, says what the schema wants."""
    schema = {
        "type": "object",
        "properties": {"mood": {"enum": ["good", "bad"]}, "score": {"type": "integer", "minimum": 1, "maximum": 5}},
        "required": ["mood", "score"],
    }
    guidance, answers = Guidance(think_budget=8, schema=json.dumps(schema)), set()
    with Engine(random_gguf, n_threads=1) as engine:
        for prompt in ("a", "b", "hello", "give me a mood", "0", "1", "2", "3"):
            steps = list(engine.stream(f"{prompt}<think>\n", Sampling(max_tokens=200), guidance=guidance))
            assert any(step.part == "thinking" for step in steps)
            if steps[-1].finish_reason == "stop":
                text = "".join(step.text for step in steps if step.part == "answer")
                jsonschema.validate(json.loads(text), schema)
                answers.add(text)
    assert len(answers) >= 2
