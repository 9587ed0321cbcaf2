"""Hold an answer to a JSON schema: the schema becomes a grammar (GBNF) that llama.cpp samples under.

A keyword that a grammar cannot enforce is refused, with its place, and never ignored: every answer that the grammar
allows validates. The grammar is narrower than the schema where that costs nothing: properties come in the schema's
order, an object that lists its properties has no others, and white space is what printers usually write. Annotations,
`format` among them, restrict nothing, as the standard says.

We do not use llama-cpp-python's own converter: it lets raw newlines into strings, loses the backslashes of constants,
confuses references that end alike, and silently drops bounds.

Source: JSON Schema 2020-12, https://json-schema.org/draft/2020-12/json-schema-validation
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from typing import Any, TypeVar

from ...errors import UsageError
from .grammar import MOST_TIMES, PRIMITIVES, decimal_numbers, literal, separated, times, whole_numbers

_TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
_IMPLIED = {  # a schema without a type has the type that its keywords belong to
    "object": {"properties", "required", "additionalProperties"},
    "array": {"items", "prefixItems", "additionalItems", "minItems", "maxItems"},
    "string": {"minLength", "maxLength"},
    "number": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"},
}
_NOT_HELD = {
    "not", "if", "pattern", "patternProperties", "propertyNames", "minProperties", "maxProperties", "dependentRequired",
    "dependentSchemas", "dependencies", "multipleOf", "uniqueItems", "contains", "unevaluatedItems",
    "unevaluatedProperties", "$dynamicRef",
}  # fmt: skip
_HELD = {"$ref", "allOf", "anyOf", "oneOf", "const", "enum", "type"}.union(*_IMPLIED.values())

_T = TypeVar("_T")


def grammar_of_schema(schema: dict[str, Any] | str) -> str:
    """Return the GBNF, with its `root`, of a JSON schema or of its text.

    Raises:
        UsageError: code "schema-unsupported": it is not a schema, or has a keyword that a grammar cannot enforce.
    """
    try:
        document = json.loads(schema) if isinstance(schema, str) else schema
        rules = _Rules(document)
        root = rules.expression(document, "#")
    except RecursionError as error:
        raise UsageError(
            "the JSON schema is nested too deeply, or refers to itself", code="schema-unsupported"
        ) from error
    except ValueError as error:
        raise UsageError(f"the JSON schema is not JSON: {error}", code="schema-unsupported") from error
    return "".join(f"{name} ::= {rule}\n" for name, rule in {"root": root, **rules.rules}.items())


class _Rules:
    """Writes each part of a schema in GBNF, with the rules that this needs; `at` is the part's place, for errors."""

    def __init__(self, document: Any) -> None:
        self.rules: dict[str, str] = {}
        self._document = document
        self._references: dict[str, str] = {}  # reference to rule

    def expression(self, schema: Any, at: str) -> str:
        """Return a schema as an expression that fits into a sequence."""
        if schema is True:
            return self._primitive("value")
        if not isinstance(schema, dict):
            raise _refused(at, "allows nothing" if schema is False else "is not a schema")
        for keyword in _NOT_HELD & schema.keys():
            if schema[keyword] is not False:
                raise _refused(at, f"says {keyword!r}, which a grammar cannot enforce")
        held = {keyword: value for keyword, value in schema.items() if keyword in _HELD}
        if held.keys() == {"$ref"}:
            return self._reference(_get(held, "$ref", default="", at=at), at)
        if held.keys() & {"$ref", "allOf"}:
            return self.expression(self._flat(held, at), at)
        for keyword in ("anyOf", "oneOf"):
            if keyword in held:
                return self._any_of(held, keyword, at)
        if "const" in held or "enum" in held:
            values = [held["const"]] if "const" in held else _get(held, "enum", default=list[Any](), at=at)
            return _either([literal(value) for value in values], at)
        if "type" not in held:
            implied = [kind for kind, keywords in _IMPLIED.items() if keywords & held.keys()]
            return self._of_type(implied[0], held, at) if implied else self._primitive("value")
        kinds = held["type"] if isinstance(held["type"], list) else [held["type"]]
        return _either([self._of_type(kind, held, at) for kind in kinds], at)

    def _any_of(self, schema: dict[str, Any], keyword: str, at: str) -> str:
        rest = {key: value for key, value in schema.items() if key != keyword}
        expressions = []
        for i, one in enumerate(_get(schema, keyword, default=list[Any](), at=at)):
            place = f"{at}/{keyword}/{i}"
            expressions.append(self.expression(_merged(rest, self._flat(one, place), place) if rest else one, place))
        return _either(expressions, at)

    def _of_type(self, kind: Any, schema: dict[str, Any], at: str) -> str:
        if kind not in _TYPES:
            raise _refused(at, f"has the type {kind!r}")
        if kind == "object" and schema.keys() & _IMPLIED["object"]:
            return self._object(schema, at)
        if kind == "array" and schema.keys() & _IMPLIED["array"]:
            return self._array(schema, at)
        if kind == "string" and schema.keys() & _IMPLIED["string"]:
            low, high = _counts(schema, ("minLength", "maxLength"), at)
            return rf'"\"" {self._primitive("char")}{times(low, high)} "\""'
        if kind in ("integer", "number") and schema.keys() & _IMPLIED["number"]:
            return _bounded(schema, kind == "number", at)
        return self._primitive(kind)

    def _object(self, schema: dict[str, Any], at: str) -> str:
        properties: dict[str, Any] = dict(_get(schema, "properties", default=dict[str, Any](), at=at))
        required = [str(name) for name in _get(schema, "required", default=list[Any](), at=at)]
        for name in required:
            properties.setdefault(name, True)
        space = self._primitive("space")
        others = schema.get("additionalProperties", True)
        if not properties and others is not False:
            pair = f'{self._primitive("string")} ":" {space} {self.expression(others, f"{at}/additionalProperties")}'
            return f'"{{" {space} ({separated(self._rule(pair, "pair"), space, low=1, high=None)} {space})? "}}"'
        pairs = {
            name: self._rule(f'{literal(name)} ":" {space} {self.expression(value, f"{at}/properties/{name}")}', name)
            for name, value in properties.items()
        }
        # The first property present has no comma before it: that may be any up to the first required one.
        beginnings = []
        for i, name in enumerate(pairs):
            rest = [f'("," {space} {pairs[after]}){"" if after in required else "?"}' for after in [*pairs][i + 1 :]]
            beginnings.append(" ".join([pairs[name], *rest]))
            if name in required:
                break
        if not beginnings:
            return f'"{{" {space} "}}"'
        return f'"{{" {space} ({_either(beginnings, at)} {space}){"" if required else "?"} "}}"'

    def _array(self, schema: dict[str, Any], at: str) -> str:
        items, prefix = schema.get("items", True), _get(schema, "prefixItems", default=list[Any](), at=at)
        if isinstance(items, list):  # before 2020-12
            items, prefix = schema.get("additionalItems", True), items
        low, high = _counts(schema, ("minItems", "maxItems"), at)
        space = self._primitive("space")
        firsts = [self.expression(item, f"{at}/prefixItems/{i}") for i, item in enumerate(prefix[:high])]
        low, high = max(low - len(firsts), 0), None if high is None else high - len(firsts)
        if high == 0 or (low == 0 and (items is False or firsts)):
            rest = ""
        else:
            item = self._rule(self.expression(items, f"{at}/items"), "item")
            rest = (
                separated(item, space, low=low, high=high) if not firsts else f'("," {space} {item}){times(low, high)}'
            )
        inside = " ".join([f' "," {space} '.join(firsts), rest]).strip()
        return f'"[" {space} {inside} {space} "]"' if inside else f'"[" {space} "]"'

    def _reference(self, reference: str, at: str) -> str:
        if reference not in self._references:
            name = self._references[reference] = self._new_name(reference.rpartition("/")[2])
            self.rules[name] = ""  # reserves the name: the schema may refer to itself
            self.rules[name] = self.expression(self._resolve(reference, at), reference)
        return self._references[reference]

    def _resolve(self, reference: str, at: str) -> Any:
        """Return what a JSON pointer points to."""
        found = self._document
        if reference != "#" and not reference.startswith("#/"):
            raise _refused(at, f"refers to {reference!r}, outside the document")
        for part in reference.split("/")[1:]:
            key = part.replace("~1", "/").replace("~0", "~")
            try:
                found = found[int(key)] if isinstance(found, list) else found[key]
            except (KeyError, IndexError, TypeError, ValueError):
                raise _refused(at, f"refers to {reference!r}, which is not there") from None
        return found

    def _flat(self, schema: Any, at: str) -> dict[str, Any]:
        """Return a schema with its `$ref` and `allOf` merged into it."""
        if schema is True:
            return {}
        if not isinstance(schema, dict):
            raise _refused(at, "allows nothing" if schema is False else "is not a schema")
        parts = list(_get(schema, "allOf", default=list[Any](), at=at))
        if "$ref" in schema:
            parts.append(self._resolve(_get(schema, "$ref", default="", at=at), at))
        flat = {keyword: value for keyword, value in schema.items() if keyword not in ("$ref", "allOf")}
        for part in parts:
            flat = _merged(flat, self._flat(part, at), at)
        return flat

    def _primitive(self, name: str) -> str:
        if name not in self.rules:
            rule, needed = PRIMITIVES[name]
            self.rules[name] = rule
            for other in needed:
                self._primitive(other)
        return name

    def _rule(self, expression: str, name: str) -> str:
        """Return the name of the rule with this expression."""
        if expression in self.rules:
            return expression
        for known, rule in self.rules.items():
            if rule == expression:
                return known
        name = self._new_name(name)
        self.rules[name] = expression
        return name

    def _new_name(self, name: str) -> str:
        name = re.sub(r"[^a-zA-Z0-9]+", "-", name).strip("-") or "part"
        taken = {"root", *PRIMITIVES, *self.rules}
        return next(new for new in (name, *(f"{name}-{i}" for i in range(2, len(taken) + 3))) if new not in taken)


def _refused(at: str, what: str) -> UsageError:
    hint = "leave it out, and check the answer afterwards"
    return UsageError(f"the JSON schema at {at} {what}", hint, code="schema-unsupported")


def _get(schema: dict[str, Any], keyword: str, *, default: _T, at: str) -> _T:
    """Return a keyword's value, which has the default's type."""
    value = schema.get(keyword, default)
    if not isinstance(value, type(default)):
        raise _refused(at, f"has a {keyword} that is not a {type(default).__name__}")
    return value


def _merged(one: dict[str, Any], other: dict[str, Any], at: str) -> dict[str, Any]:
    """Return a schema that allows what both allow."""
    merged = one | other
    for keyword in one.keys() & other.keys() & (_HELD | _NOT_HELD):
        a, b = one[keyword], other[keyword]
        if a == b:
            continue
        if keyword == "properties":
            both = {name: {"allOf": [a[name], b[name]]} for name in a.keys() & b.keys()}
            merged[keyword] = a | b | both
        elif keyword == "required":
            merged[keyword] = list(dict.fromkeys([*a, *b]))
        elif keyword == "enum":
            merged[keyword] = [value for value in a if value in b]
        elif keyword.startswith(("min", "exclusiveMin")):
            merged[keyword] = max(a, b)
        elif keyword.startswith(("max", "exclusiveMax")):
            merged[keyword] = min(a, b)
        else:
            raise _refused(at, f"says {keyword!r} in two ways")
    for part in (one, other):
        if part.get("additionalProperties", True) is not True and part.get("properties") != merged.get("properties"):
            raise _refused(at, "closes an object to properties that another part of it names")
    return merged


def _either(expressions: Iterable[str], at: str) -> str:
    different = list(dict.fromkeys(expressions))
    if not different:
        raise _refused(at, "allows no value")
    return different[0] if len(different) == 1 else f"({' | '.join(different)})"


def _counts(schema: dict[str, Any], keywords: tuple[str, str], at: str) -> tuple[int, int | None]:
    low_keyword, high_keyword = keywords
    low = _get(schema, low_keyword, default=0, at=at)
    high = _get(schema, high_keyword, default=0, at=at) if high_keyword in schema else None
    if not 0 <= low <= (MOST_TIMES if high is None else high) <= MOST_TIMES:
        raise _refused(at, f"counts from {low} to {high}: a grammar counts from 0 to {MOST_TIMES:,}")
    return low, high


def _bounded(schema: dict[str, Any], fractions: bool, at: str) -> str:
    """Return an expression for the numbers between two bounds, which are whole even where fractions are allowed."""
    bounds: dict[str, int | None] = {"minimum": None, "maximum": None}
    for keyword in _IMPLIED["number"] & schema.keys():
        value = schema[keyword]
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise _refused(at, f"has a {keyword} that is not a number")
        is_low, exclusive = keyword.lower().endswith("minimum"), keyword.startswith("exclusive")
        if fractions and (exclusive or value != int(value)):
            raise _refused(
                at, f"says {keyword!r} {value}: a grammar bounds decimal numbers only by whole, inclusive limits"
            )
        whole = math.ceil(value) if is_low else math.floor(value)
        if exclusive and whole == value:
            whole += 1 if is_low else -1
        name = "minimum" if is_low else "maximum"
        before = bounds[name]
        bounds[name] = whole if before is None else max(before, whole) if is_low else min(before, whole)
    low, high = bounds["minimum"], bounds["maximum"]
    if low is not None and high is not None and low > high:
        raise _refused(at, f"allows no number: {low} is above {high}")
    return decimal_numbers(low, high) if fractions else whole_numbers(low, high)
