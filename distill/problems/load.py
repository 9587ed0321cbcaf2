"""Problems from one string, drawn from one bucket of the split; every draw is distinct by question.

`gym:NAME?param=value&…` (reasoning-gym), a JSONL, CSV or Parquet file, `hf:ORG/NAME?split=train&config=…` (a data set
on the hub), a .txt file with a prompt a line, or a folder of prompts. The spec may name the columns and the grader:
`file.csv?question=task&answer=solution&grader=number:tolerance=0.01`. Without an answer the grader is `none`. A column
with worked solutions (`worked=COLUMN`) makes the problems their own teacher: `--teacher worked`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from ...errors import ArtifactError, UsageError
from ..graders.base import is_trusted, kind_of
from ..records import NONE, Problem
from .columns import PROBLEM_ANSWERS, PROBLEM_METADATA, PROBLEM_QUESTIONS, PROBLEM_WORKED, find_column, problem_answer
from .files import Columns, read_hub, read_rows
from .split import Bucket, bucket_of, question_hash

_DEFAULT_N = 1000
_SHARES = {"train": 0.8, "validation": 0.05, "test": 0.15, None: 1.0}


def load_problems(
    spec: str, bucket: Bucket | None = None, *, n: int | None = None, seed: int | None = None, offline: bool = False
) -> list[Problem]:
    """Return up to n distinct problems of a bucket (None: of every bucket), always the same ones in the same order.

    A source with fewer problems gives all of them. `n` and `seed` default to the spec's own `size` and `seed`. Offline,
    a data set of the hub comes from the cache.

    >>> from deepdistill import load_problems
    >>> problem, *_ = load_problems("gym:chain_sum?max_terms=2&max_digits=1", "test", n=10)
    >>> print(problem.question, problem.answer)
    State the final answer to the following arithmetic problem: 4 - 1 = 3

    Raises:
        UsageError: `code` "bad-spec", "bad-parameter", "no-such-parameter", "no-such-dataset", "no-such-grader",
            "untrusted-grader", or one of `read_rows` and `read_hub`.
        ArtifactError: `code` "no-such-column", "empty-question", "no-problems" if there is none in this bucket, or one
            of `read_rows` and `read_hub`.
    """
    n, drawn = _draw(spec, bucket, n=n, seed=seed, offline=offline)
    problems = _distinct(drawn, bucket, n)
    if not problems:
        where = f"the {bucket} part of {spec}" if bucket else spec
        raise ArtifactError(
            f"there is no problem in {where}",
            "the split keeps 80 % for training and 15 % for tests: give more problems",
            code="no-problems",
        )
    return problems


def _distinct(drawn: Iterator[Problem], bucket: Bucket | None, n: int) -> list[Problem]:
    """Return the first n distinct problems of a bucket."""
    problems: dict[str, Problem] = {}
    for problem in drawn:
        if len(problems) == n:
            break
        if bucket is None or bucket_of(problem.question) == bucket:
            problems.setdefault(problem.id, problem)
    return list(problems.values())


def with_params(spec: str) -> tuple[str, dict[str, Any]]:
    """Return the data-set name of a gym spec and its full configuration, defaults included.

    Raises:
        UsageError: `code` "bad-spec", "no-such-dataset", "no-such-parameter" or "bad-parameter".
    """
    path, params = _parse(spec)
    if not path.startswith("gym:"):
        raise UsageError(f"{spec} is not a reasoning-gym spec", "write gym:NAME?param=value", code="bad-spec")
    name = path.removeprefix("gym:")
    params = {key: value for key, value in params.items() if key not in ("size", "seed")}
    return name, dataclasses.asdict(_gym_dataset(name, params, seed=0, size=1).config)


def _draw(
    spec: str, bucket: Bucket | None, *, n: int | None, seed: int | None, offline: bool
) -> tuple[int, Iterator[Problem]]:
    """Return how many problems are wanted, and an iterator over the source's."""
    path, params = _parse(spec)
    size, spec_seed = _whole(params.pop("size", _DEFAULT_N), "size"), _whole(params.pop("seed", 0), "seed")
    n, seed = size if n is None else n, spec_seed if seed is None else seed
    if path.startswith("gym:"):
        n_drawn = int(n / _SHARES[bucket] * 1.5) + 20
        return n, _draw_gym(path.removeprefix("gym:"), params, n=n_drawn, seed=seed)
    if path.startswith("hf:"):
        split, config = str(params.pop("split", "train")), params.pop("config", None)
        config = None if config is None else str(config)
        rows = read_hub(path.removeprefix("hf:"), split=split, config=config, offline=offline)
    else:
        rows = read_rows(Path(path))
    return n, _draw_rows(rows, params, path)


def _parse(spec: str) -> tuple[str, dict[str, Any]]:
    path, _, query = spec.partition("?")
    params = dict(parse_qsl(query, keep_blank_values=True))
    if query and len(params) != query.count("&") + 1:
        hint = "write gym:NAME?param=value&param=value"
        raise UsageError(f"cannot read the parameters of {spec!r}", hint, code="bad-spec")
    return path, {key: _literal(value) for key, value in params.items()}


def _literal(value: str) -> Any:
    try:
        return json.loads(value.lower() if value in ("True", "False") else value)
    except ValueError:
        return value


def _whole(value: Any, name: str) -> int:
    if not isinstance(value, int) or value < (1 if name == "size" else 0):
        hint = "write a positive number, as in ?size=500" if name == "size" else "write a number, as in ?seed=1"
        raise UsageError(f"{name} must be a whole number, not {value!r}", hint, code="bad-parameter")
    return value


def _gym_dataset(name: str, params: Mapping[str, Any], *, seed: int, size: int) -> Any:
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if name not in DATASETS:
        import difflib

        near = difflib.get_close_matches(name, DATASETS, n=3)
        names = f"there are {len(DATASETS)}: {', '.join(sorted(DATASETS))}"
        hint = f"did you mean {' or '.join(near)}?" if near else names
        raise UsageError(f"reasoning-gym has no data set {name!r}", hint, code="no-such-dataset")
    known = {f.name: f.default for f in dataclasses.fields(DATASETS[name][1]) if f.name not in ("seed", "size")}
    unknown = sorted(set(params) - set(known))
    if unknown:
        hint = f"its parameters are {', '.join(known)}" if known else "it takes none"
        raise UsageError(f"{name} has no parameter {', '.join(unknown)}", hint, code="no-such-parameter")
    try:
        return reasoning_gym.create_dataset(name, seed=seed, size=size, **params)
    except (AssertionError, TypeError, ValueError) as error:
        fault = f"reasoning-gym refuses {name} with {dict(params)}: {error}".rstrip(": ")
        raise UsageError(fault, "change these parameters", code="bad-parameter") from error


def _draw_gym(name: str, params: dict[str, Any], *, n: int, seed: int) -> Iterator[Problem]:
    """Yield n problems, then as many again as long as new ones come."""
    source = f"gym:{name}" + ("?" + "&".join(f"{k}={v}" for k, v in params.items()) if params else "")
    start, size, seen = 0, n, set[str]()
    while size - start > 0:
        items, before = _gym_dataset(name, params, seed=seed, size=size), len(seen)
        for index in range(start, size):
            try:
                item = items[index]
            except IndexError:
                return
            seen.add(item["question"])
            yield Problem(
                id=question_hash(item["question"])[:16],
                question=item["question"],
                answer=item["answer"],
                source=source,
                grader=f"gym:{name}",
                metadata=json.loads(json.dumps(item["metadata"], default=str)),
            )
        # A round with few new questions means that the data set has run dry.
        start, size = size, size * 2 if len(seen) - before > (size - start) // 20 else size


def _draw_rows(rows: Iterator[tuple[str, Columns]], params: dict[str, Any], source: str) -> Iterator[Problem]:
    unknown = sorted(set(params) - {"question", "answer", "grader", "worked"})
    if unknown:
        takes = "question=COLUMN, answer=COLUMN, worked=COLUMN and grader=GRADER"
        takes += ", split=NAME and config=NAME" if source.startswith("hf:") else ""
        raise UsageError(
            f"{source} has no parameter {', '.join(unknown)}", f"it takes {takes}", code="no-such-parameter"
        )
    if params.get("grader") is not None:
        _check_grader(str(params["grader"]))
    is_empty = True
    for where, row in rows:
        is_empty = False
        yield _problem(row, params, source=source, where=where)
    if is_empty:
        raise ArtifactError(
            f"{source} has no problems", "write one problem a line, with a question and an answer", code="no-problems"
        )


def _problem(row: Columns, params: dict[str, Any], *, source: str, where: str) -> Problem:
    """Return the problem of a row; `params` may name its columns and its grader."""
    question = find_column(row, params.get("question"), PROBLEM_QUESTIONS)
    answer = find_column(row, params.get("answer"), PROBLEM_ANSWERS)
    if question is None or (answer is None and "answer" in params):
        missing = "question" if question is None else "answer"
        raise ArtifactError(
            f"{where} has no {missing} column; it has {', '.join(map(str, row))}",
            f"name the column: '{source}?{missing}=COLUMN'",
            code="no-such-column",
        )
    text = "" if row[question] is None else str(row[question]).strip()
    if not text:
        hint = f"fill in the column {question}, or remove the row"
        raise ArtifactError(f"the question at {where} is empty", hint, code="empty-question")
    metadata = _metadata(row) | _worked(row, params.get("worked"), answer=answer, where=where)
    gold = None if answer is None else problem_answer(row[answer])
    named = params.get("grader")
    grader = str(named) if named is not None else _grader_of(row, gold, metadata=metadata, where=where)
    return Problem(
        id=question_hash(text)[:16], question=text, answer=gold, source=source, grader=grader, metadata=metadata
    )


def _metadata(row: Columns) -> dict[str, Any]:
    """Return what graders need beside the answer, by the name that they know it by."""
    found = {}
    for name, columns in PROBLEM_METADATA.items():
        column = find_column(row, None, columns)
        if column is not None and row[column] not in (None, "", [], {}):
            found[name] = json.loads(json.dumps(row[column], default=str))
    return found


def _worked(row: Columns, named: str | None, *, answer: str | None, where: str) -> dict[str, Any]:
    """Return the worked solution of a row: its named column, a usual one, or the text before the answer's `####`."""
    column = find_column(row, named, [name for name in PROBLEM_WORKED if name != (answer or "").lower()])
    if named is not None and column is None:
        raise ArtifactError(
            f"{where} has no column {named}; it has {', '.join(map(str, row))}",
            "name the column of the worked solutions: ?worked=COLUMN",
            code="no-such-column",
        )
    text = row[column] if column is not None else (row[answer] if answer is not None else None)
    is_worked = isinstance(text, str) and text.strip() and (column is not None or "####" in text)
    return {"worked": text} if is_worked else {}


def _grader_of(row: Columns, gold: str | None, *, metadata: Mapping[str, Any], where: str) -> str:
    """Return the row's own grader, or the one that its columns call for."""
    column = find_column(row, None, ("grader",))
    if column is not None and row[column]:
        grader = str(row[column])
        _check_grader(grader, where)
        if is_trusted(grader):
            raise UsageError(
                f"{where} names the grader {grader}, which runs code without a sandbox",
                f"if you trust it, name it yourself: ?grader={grader}",
                code="untrusted-grader",
            )
        return grader
    if "tests" in metadata:
        return "python"
    if gold is None:
        return NONE
    return "choice" if "choices" in metadata else "math"


def _check_grader(grader: str, where: str = "") -> None:
    try:
        if grader != NONE:
            kind_of(grader)
    except UsageError as error:
        raise UsageError(
            f"{where}: {error.message}" if where else error.message, error.hint, code=error.code
        ) from error
