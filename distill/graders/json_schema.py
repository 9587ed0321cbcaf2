"""A JSON document that a JSON Schema accepts.

The schema is a file (`json_schema:FILE`), or `schema` in the problem's metadata, or else the reference answer. If a
problem has both a schema and a reference answer, the document must also equal the reference. The document is the
content, or the last fenced block in it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NoReturn

from ...localrun.core.text import first_line
from .base import CannotTell, Submission

_FENCE = re.compile(
    r"^[ \t]*```[ \t]*(?:json[c5]?)?[ \t]*\n(.*?)^[ \t]*```[ \t]*$", re.DOTALL | re.MULTILINE | re.IGNORECASE
)


def load(_: str) -> None:
    """Import the library."""
    import jsonschema  # type: ignore[import-untyped]  # noqa: F401


def grade(submission: Submission) -> float:
    """Return 1.0 if the document is one JSON value that the schema accepts, else 0.0."""
    from jsonschema.exceptions import SchemaError  # type: ignore[import-untyped]
    from jsonschema.validators import validator_for  # type: ignore[import-untyped]
    from referencing import Registry
    from referencing.exceptions import Unresolvable

    schema, gold = _schema(submission)
    kind = validator_for(schema)
    try:
        kind.check_schema(schema)
        try:
            document = parse(extract(submission.content))
        except (ValueError, RecursionError):
            return 0.0
        # An empty registry, so that a schema at another address is never fetched.
        accepted = kind(schema, registry=Registry(), format_checker=kind.FORMAT_CHECKER).is_valid(document)
    except (SchemaError, Unresolvable, re.error) as error:
        raise CannotTell(f"the schema is broken: {first_line(error)}") from error
    return 1.0 if accepted and (gold is None or _canonical(document) == _canonical(gold[0])) else 0.0


def extract(content: str) -> str:
    """Return the last fenced block of a content, else all of it."""
    blocks: list[str] = _FENCE.findall(content)
    return blocks[-1] if blocks else content


def _schema(submission: Submission) -> tuple[Any, tuple[Any] | None]:
    """Return the schema, and the reference document in a tuple if there is one."""
    source: Any = submission.metadata.get("schema")
    try:
        if submission.argument:
            source = Path(submission.argument).read_text(encoding="utf-8")
        gold = None if submission.gold is None else (parse(submission.gold),)
        schema = parse(source) if isinstance(source, str) else source
    except (OSError, ValueError, RecursionError) as error:
        raise CannotTell(f"cannot read the schema or the reference: {error}") from error
    if schema is None:
        if gold is None:
            raise CannotTell("the problem has no schema")
        schema, gold = gold[0], None
    if not isinstance(schema, dict | bool):
        raise CannotTell("the schema is neither an object nor true or false")
    return schema, gold


def parse(text: str) -> Any:
    """Return the JSON value of a text.

    Raises:
        ValueError: the text is not JSON, or has NaN, an infinity or a key twice.
        RecursionError: it is nested too deeply.
    """

    def refuse(name: str) -> NoReturn:
        raise ValueError(f"{name} is not JSON")

    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a key appears twice")
        return dict(pairs)

    return json.loads(text, parse_constant=refuse, object_pairs_hook=distinct)


def _canonical(value: Any) -> Any:
    """Return a form in which two values are equal only if JSON says so: 1 equals 1.0 but not true."""
    if isinstance(value, dict):
        return {key: _canonical(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_canonical(item) for item in value]
    return (type(value) is bool, value)
