"""Problems from one string, `gym:NAME?param=value&…` or a JSONL, CSV or Parquet file, drawn from one bucket.

A file may name its columns: `file.csv?question=task&answer=solution`. Every draw is distinct by question.
"""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from ..errors import ArtifactError, UsageError
from .split import Bucket, bucket_of, question_hash

_QUESTION_COLUMNS = ("question", "problem", "prompt", "instruction", "input")
_ANSWER_COLUMNS = ("answer", "final_answer", "solution", "output", "target", "ground_truth")
_DEFAULT_N = 1000


@dataclass(frozen=True)
class Problem:
    """One question. `grader` is `gym:NAME` (reasoning-gym's scorer) or `math`; `id` depends on the question alone."""

    id: str
    question: str
    answer: str | None
    source: str
    grader: str
    metadata: dict[str, Any] = field(default_factory=dict)


def load_problems(
    spec: str, bucket: Bucket | None = None, n: int | None = None, seed: int | None = None
) -> list[Problem]:
    """Return up to n distinct problems of a bucket (None: of every bucket), always the same ones in the same order.

    A source that holds fewer gives what it has. n and seed default to the spec's own `size` and `seed`.

    Raises:
        UsageError: an unknown data set, parameter or column.
        ArtifactError: a missing, broken or empty file, or one without a problem in this bucket.
    """
    path, params = _parse(spec)
    size, own_seed = _whole(params.pop("size", _DEFAULT_N), "size"), _whole(params.pop("seed", 0), "seed")
    n, seed = size if n is None else n, own_seed if seed is None else seed
    if path.startswith("gym:"):
        drawn = _draw_gym(path.removeprefix("gym:"), params, n, bucket, seed)
    else:
        drawn = _read_file(Path(path), params)
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


def _read_file(path: Path, params: dict[str, Any]) -> Iterator[Problem]:
    unknown = sorted(set(params) - {"question", "answer"})
    if unknown:
        raise UsageError(
            f"a problem file has no parameter {', '.join(unknown)}", "it takes question=COLUMN and answer=COLUMN"
        )
    if not path.is_file():
        raise ArtifactError(
            f"no problem file at {path}", "problems are gym:NAME?param=value or a .jsonl, .csv or .parquet file"
        )
    count = 0
    for where, row in _rows(path):
        question, answer = _column(row, params.get("question"), _QUESTION_COLUMNS), None
        answer = _column(row, params.get("answer"), _ANSWER_COLUMNS)
        if question is None or answer is None:
            missing = "question" if question is None else "answer"
            raise ArtifactError(
                f"{where} has no {missing} column; it has {', '.join(map(str, row))}",
                f"name it: '{path}?{missing}=COLUMN'",
            )
        text, gold = str(row[question]).strip(), row[answer]
        if not text or row[question] is None:
            raise ArtifactError(f"{where}: the question is empty")
        count += 1
        yield Problem(
            id=question_hash(text)[:16],
            question=text,
            answer=None if gold is None else str(gold).rsplit("####", 1)[-1].strip(),  # GSM8K's mark before the answer
            source=str(path),
            grader="math",
        )
    if not count:
        raise ArtifactError(f"{path} holds no problems", "one problem a line, with a question and an answer")


def _column(row: Mapping[str, Any], named: str | None, usual: Iterable[str]) -> str | None:
    if named is not None:
        return named if named in row else None
    lower = {str(key).lower(): key for key in row}
    return next((lower[name] for name in usual if name in lower), None)


def _rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield (where it stands, the row) from a file by its suffix."""
    suffix = path.suffix.lower()
    try:
        if suffix in (".jsonl", ".ndjson"):
            with path.open(encoding="utf-8") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        row = json.loads(line)
                        if not isinstance(row, dict):
                            raise ArtifactError(f"{path}:{number} is not a JSON object")
                        yield f"{path}:{number}", row
        elif suffix == ".csv":
            with path.open(encoding="utf-8", newline="") as lines:
                for number, row in enumerate(csv.DictReader(lines, strict=True), 2):
                    yield f"{path}:{number}", row
        elif suffix == ".parquet":
            import pyarrow.parquet

            for number, row in enumerate(pyarrow.parquet.read_table(path).to_pylist(), 1):
                yield f"{path} row {number}", row
        else:
            raise UsageError(f"cannot tell what {path} is", "problem files end in .jsonl, .csv or .parquet")
    except (ValueError, csv.Error) as error:  # json, unicode and pyarrow errors are ValueErrors
        raise ArtifactError(f"{path} is broken: {error}") from error
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error}") from error
