"""Problems from one string, drawn from one bucket of the split; every draw is distinct by question.

`gym:NAME?param=value&…` (reasoning-gym), a JSONL, JSON, CSV or Parquet file, `hf:ORG/NAME?split=train&config=…` (a
data set on the hub), a .txt file with a prompt a line, or a folder of prompts. The spec may name the columns and the
grader: `file.csv?question=task&answer=solution&grader=number:tolerance=0.01`; without one the shape of a reference
chooses it (see shape.py), and without an answer it is `none`. A
column with worked solutions (`worked=COLUMN`) makes the problems their own teacher: `--teacher worked`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from ...errors import ArtifactError, UsageError
from ...localrun.core.reporter import SILENT, Reporter
from ..recipe.gathering import AskingRecipe
from ..records import Problem, messages_of
from .files import Row, encoding_of, is_text, read_hub, read_rows
from .instruction import instructed
from .rows import PARAMETERS, Intake, check_grader
from .split import Bucket, bucket_of, question_id

_DEFAULT_N = 1000
_N_SURVEYED = 100_000  # rows that are looked at for labels before the first problem
_SHARES = {"train": 0.8, "validation": 0.05, "test": 0.15, None: 1.0}


def load_problems(
    spec: str,
    bucket: Bucket | None = None,
    *,
    n: int | None = None,
    seed: int | None = None,
    offline: bool = False,
    asking: AskingRecipe | None = None,
    report: Reporter = SILENT,
) -> list[Problem]:
    """Return up to n distinct problems of a bucket (None: of every bucket), always the same ones in the same order.

    A source with fewer problems gives all of them. `n` and `seed` default to the spec's own `size` and `seed`. Offline,
    a data set of the hub comes from the cache. `asking` has the instruction, and says what chooses the graders of rows;
    `report` is told of rows that could not be used, of columns that were
    not, and of questions that are there twice with different answers.

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
    path, params = _parse(spec)
    size, spec_seed = _whole(params.pop("size", _DEFAULT_N), "size"), _whole(params.pop("seed", 0), "seed")
    n, seed = size if n is None else n, spec_seed if seed is None else seed
    if path.startswith("gym:"):
        n_drawn = int(n / _SHARES[bucket] * 1.5) + 20
        problems = _distinct(
            _draw_gym(path.removeprefix("gym:"), params, n=n_drawn, seed=seed), bucket, n=n, report=report
        )
        if asking and asking.instruction:
            problems = [replace(p, messages=instructed(messages_of(p), asking.instruction)) for p in problems]
    else:
        rows = _rows_of(path, params, offline=offline)
        intake = Intake(path, _checked(params, path), asking or AskingRecipe())
        intake.find_labels(islice(rows(), _N_SURVEYED))
        problems = _distinct(intake.problems(rows()), bucket, n=n, report=report)
        if not path.startswith("hf:") and is_text(Path(path)) and encoding_of(Path(path)) == "cp1252":
            report.say(f"{path} is not UTF-8: it is read as Windows-1252, and a wrong character may be in it")
        for note in intake.notes():
            report.say(f"{path}: {note}")
    if not problems:
        where = f"the {bucket} part of {spec}" if bucket else spec
        raise ArtifactError(
            f"there is no problem in {where}",
            "the split keeps 80 % for training and 15 % for tests: give more problems",
            code="no-problems",
        )
    return problems


def _distinct(drawn: Iterator[Problem], bucket: Bucket | None, *, n: int, report: Reporter) -> list[Problem]:
    """Return the first n distinct problems of a bucket; of the same question with two references, the first."""
    problems: dict[str, Problem] = {}
    n_contradicted, example = 0, ""
    for problem in drawn:
        if len(problems) == n:
            break
        if bucket is not None and bucket_of(problem.question) != bucket:
            continue
        first = problems.setdefault(problem.id, problem)
        if first.answer != problem.answer:
            n_contradicted, example = n_contradicted + 1, example or f"{first.answer} and {problem.answer}"
    if n_contradicted:
        report.say(f"{n_contradicted} questions are there twice with different answers ({example}): the first counts")
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


def _rows_of(path: str, params: dict[str, Any], *, offline: bool) -> Callable[[], Iterator[tuple[str, Row]]]:
    """Return what reads a file, a folder or a data set of the hub; take the hub's own parameters out of `params`."""
    if not path.startswith("hf:"):
        return lambda: read_rows(Path(path))
    split, config = str(params.pop("split", "train")), params.pop("config", None)
    config = None if config is None else str(config)
    return lambda: read_hub(path.removeprefix("hf:"), split=split, config=config, offline=offline)


def _checked(params: dict[str, Any], source: str) -> dict[str, Any]:
    """Return the parameters of a table.

    Raises:
        UsageError: `code` "no-such-parameter", "bad-parameter" or "no-such-grader".
    """
    if unknown := sorted(set(params) - set(PARAMETERS)):
        takes = "question=COLUMN, answer=COLUMN, worked=COLUMN, answers=all|any and grader=GRADER"
        takes += ", split=NAME and config=NAME" if source.startswith("hf:") else ""
        raise UsageError(
            f"{source} has no parameter {', '.join(unknown)}", f"it takes {takes}", code="no-such-parameter"
        )
    if params.get("answers") not in (None, "all", "any"):
        hint = "answers=all asks for all of several answers, answers=any takes any of them"
        raise UsageError(f"answers cannot be {params['answers']!r}", hint, code="bad-parameter")
    if params.get("grader") is not None:
        check_grader(str(params["grader"]))
    return params


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
                id=question_id(item["question"]),
                question=item["question"],
                answer=item["answer"],
                source=source,
                grader=f"gym:{name}",
                metadata=json.loads(json.dumps(item["metadata"], default=str)),
            )
        # A round with few new questions means that the data set has run dry.
        start, size = size, size * 2 if len(seen) - before > (size - start) // 20 else size
