"""Problems from one string, drawn from one bucket; every draw is distinct by question.

`gym:NAME?param=value&…` (reasoning-gym), a JSONL, CSV or Parquet file, `hf:ORG/NAME?split=train&config=…` (a data set
on the hub), a .txt file with a prompt a line, or a folder of prompts. Columns can be named, and the grader:
`file.csv?question=task&answer=solution&grader=number:tolerance=0.01`. Without an answer the grader is `none`. A column
with worked solutions (`worked=COLUMN`) makes the problems their own teacher: `--teacher worked`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from ...errors import ArtifactError, UsageError
from ..graders.base import is_trusted, kind_of
from ..records import NONE, Problem
from .files import read_hub, read_rows
from .split import Bucket, bucket_of, question_hash

_QUESTION_COLUMNS = ("question", "problem", "prompt", "instruction", "input")
_ANSWER_COLUMNS = ("answer", "final_answer", "solution", "output", "target", "ground_truth")
_METADATA_COLUMNS = {
    "tests": ("tests", "test_list", "unit_tests", "test"),
    "test_setup": ("test_setup", "test_setup_code"),
    "entry_point": ("entry_point",),
    "choices": ("choices", "options"),
    "schema": ("schema", "json_schema"),
}
_WORKED_COLUMNS = ("worked", "answer_cot", "solution", "worked_solution", "rationale", "explanation")
_DEFAULT_N = 1000


def load_problems(
    spec: str, bucket: Bucket | None = None, n: int | None = None, seed: int | None = None, *, offline: bool = False
) -> list[Problem]:
    """Return up to n distinct problems of a bucket (None: of every bucket), always the same ones in the same order.

    A source that holds fewer gives what it has. n and seed default to the spec's own `size` and `seed`. With offline,
    a data set of the hub comes from the cache.

    Raises:
        UsageError: an unknown data set, parameter, column or grader.
        ArtifactError: a missing, broken or empty file, or one without a problem in this bucket.
    """
    path, params = _parse(spec)
    size, own_seed = _whole(params.pop("size", _DEFAULT_N), "size"), _whole(params.pop("seed", 0), "seed")
    n, seed = size if n is None else n, own_seed if seed is None else seed
    if path.startswith("gym:"):
        drawn = _draw_gym(path.removeprefix("gym:"), params, n, bucket, seed)
    elif path.startswith("hf:"):
        split, config = str(params.pop("split", "train")), params.pop("config", None)
        rows = read_hub(path.removeprefix("hf:"), split, None if config is None else str(config), offline)
        drawn = _draw_rows(rows, params, path)
    else:
        drawn = _draw_rows(read_rows(Path(path)), params, path)
    problems: dict[str, Problem] = {}
    for problem in drawn:
        if len(problems) == n:
            break
        if bucket is None or bucket_of(problem.question) == bucket:
            problems.setdefault(problem.id, problem)
    if not problems:
        where = f"the {bucket} part of {spec}" if bucket else spec
        raise ArtifactError(
            f"no problem in {where}", "the split keeps 80 % for training and 15 % for tests; give more problems"
        )
    return list(problems.values())


def with_params(spec: str) -> tuple[str, dict[str, Any]]:
    """Return a gym spec's data-set name and its full configuration, defaults included.

    Raises:
        UsageError: not a gym spec, or an unknown data set or parameter.
    """
    path, params = _parse(spec)
    if not path.startswith("gym:"):
        raise UsageError(f"{spec} is not a reasoning-gym spec", "write gym:NAME?param=value")
    name = path.removeprefix("gym:")
    params = {key: value for key, value in params.items() if key not in ("size", "seed")}
    return name, dataclasses.asdict(_gym_dataset(name, params, seed=0, size=1).config)


def _parse(spec: str) -> tuple[str, dict[str, Any]]:
    path, _, query = spec.partition("?")
    params = dict(parse_qsl(query, keep_blank_values=True))
    if query and len(params) != query.count("&") + 1:
        raise UsageError(f"cannot read the parameters of {spec!r}", "write gym:NAME?param=value&param=value")
    return path, {key: _literal(value) for key, value in params.items()}


def _literal(value: str) -> Any:
    try:
        return json.loads(value.lower() if value in ("True", "False") else value)
    except ValueError:
        return value


def _whole(value: Any, name: str) -> int:
    if not isinstance(value, int) or value < (1 if name == "size" else 0):
        raise UsageError(f"{name} must be a whole number, not {value!r}")
    return value


def _gym_dataset(name: str, params: Mapping[str, Any], seed: int, size: int) -> Any:
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if name not in DATASETS:
        import difflib

        near = difflib.get_close_matches(name, DATASETS, n=3)
        hint = (
            f"did you mean {', '.join(near)}?" if near else f"there are {len(DATASETS)}: {', '.join(sorted(DATASETS))}"
        )
        raise UsageError(f"reasoning-gym has no data set {name!r}", hint)
    known = {f.name: f.default for f in dataclasses.fields(DATASETS[name][1]) if f.name not in ("seed", "size")}
    unknown = sorted(set(params) - set(known))
    if unknown:
        takes = ", ".join(known) or "none"
        raise UsageError(f"{name} has no parameter {', '.join(unknown)}", f"its parameters: {takes}")
    try:
        return reasoning_gym.create_dataset(name, seed=seed, size=size, **params)
    except (AssertionError, TypeError, ValueError) as error:
        raise UsageError(f"reasoning-gym refuses {name} with {dict(params)}: {error}".rstrip(": ")) from error


def _draw_gym(name: str, params: dict[str, Any], n: int, bucket: Bucket | None, seed: int) -> Iterator[Problem]:
    source = f"gym:{name}" + ("?" + "&".join(f"{k}={v}" for k, v in params.items()) if params else "")
    share = {"train": 0.8, "validation": 0.05, "test": 0.15, None: 1.0}[bucket]
    start, size, seen = 0, int(n / share * 1.5) + 20, set[str]()
    while size - start > 0:
        items, before = _gym_dataset(name, params, seed, size), len(seen)
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
        # A round with few new questions says that the data set has run dry.
        start, size = size, size * 2 if len(seen) - before > (size - start) // 20 else size


def _draw_rows(rows: Iterator[tuple[str, Mapping[str, Any]]], params: dict[str, Any], source: str) -> Iterator[Problem]:
    unknown = sorted(set(params) - {"question", "answer", "grader", "worked"})
    if unknown:
        raise UsageError(
            f"{source} has no parameter {', '.join(unknown)}",
            "it takes question=COLUMN, answer=COLUMN, worked=COLUMN and grader=GRADER" + _hub_hint(source),
        )
    grader = params.get("grader")
    if grader is not None:
        _check_grader(str(grader))
    count = 0
    for where, row in rows:
        question = _column(row, params.get("question"), _QUESTION_COLUMNS)
        answer = _column(row, params.get("answer"), _ANSWER_COLUMNS)
        if question is None or (answer is None and "answer" in params):
            missing = "question" if question is None else "answer"
            raise ArtifactError(
                f"{where} has no {missing} column; it has {', '.join(map(str, row))}",
                f"name it: '{source}?{missing}=COLUMN'",
            )
        text = "" if row[question] is None else str(row[question]).strip()
        if not text:
            raise ArtifactError(f"{where}: the question is empty")
        count += 1
        metadata = _metadata(row) | _worked(row, params.get("worked"), answer, where)
        gold = None if answer is None else _gold(row[answer])
        yield Problem(
            id=question_hash(text)[:16],
            question=text,
            answer=gold,
            source=source,
            grader=str(grader) if grader is not None else _grader_of(row, gold, metadata, where),
            metadata=metadata,
        )
    if not count:
        raise ArtifactError(f"{source} holds no problems", "one problem a line, with a question and an answer")


def _hub_hint(source: str) -> str:
    return ", split=NAME and config=NAME" if source.startswith("hf:") else ""


def _gold(value: Any) -> str | None:
    """Return a reference answer as text, without what GSM8K writes before it; None for a blank one."""
    if value is None:
        return None
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text.rsplit("####", 1)[-1].strip() or None


def _metadata(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return what graders need beside the answer, under the names they know."""
    found = {}
    for name, columns in _METADATA_COLUMNS.items():
        column = _column(row, None, columns)
        if column is not None and row[column] not in (None, "", [], {}):
            found[name] = json.loads(json.dumps(row[column], default=str))
    return found


def _worked(row: Mapping[str, Any], named: str | None, answer: str | None, where: str) -> dict[str, Any]:
    """Return the worked solution of a row: in the named column, in a usual one, or before the answer's `####`."""
    column = _column(row, named, [name for name in _WORKED_COLUMNS if name != (answer or "").lower()])
    if named is not None and column is None:
        raise ArtifactError(f"{where} has no column {named}; it has {', '.join(map(str, row))}")
    text = row[column] if column is not None else (row[answer] if answer is not None else None)
    is_worked = isinstance(text, str) and text.strip() and (column is not None or "####" in text)
    return {"worked": text} if is_worked else {}


def _grader_of(row: Mapping[str, Any], gold: str | None, metadata: Mapping[str, Any], where: str) -> str:
    """Return the row's own grader, or what its columns call for."""
    column = _column(row, None, ("grader",))
    if column is not None and row[column]:
        grader = str(row[column])
        _check_grader(grader, where)
        if is_trusted(grader):
            raise UsageError(
                f"{where} names the grader {grader}, which runs code unconfined", f"if you trust it: ?grader={grader}"
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
        raise UsageError(f"{where}: {error.message}" if where else error.message, error.hint) from error


def _column(row: Mapping[str, Any], named: str | None, usual: Iterable[str]) -> str | None:
    if named is not None:
        return named if named in row else None
    lower = {str(key).lower(): key for key in row}
    return next((lower[name] for name in usual if name in lower), None)
