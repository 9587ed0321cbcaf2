"""Negative controls: no grader calls a wrong, malformed or hostile answer right, nor the answer to another problem.

Each table holds at least 50 answers that must not be `right` and 20 that must be, in the forms that models write.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from deepdistill.distill.graders.pool import Grader
from deepdistill.distill.records import Grade, Problem
from deepdistill.errors import UsageError

# What no problem's answer is: empty, cut off, hedged, hostile.
HOSTILE = [
    "", " \n\t ", "\0", "?", "...", "None", "null", "nan", "NaN", "inf", "-inf", "True", "right", "correct", "1.0",
    "I don't know.", "The answer is", "Answer:", "Answer: ?", r"\boxed{}", r"\boxed{", r"\boxed{\boxed{}}", "<answer>",
    "<answer></answer>", "</answer><answer>", "$$", "$", "{}", "[]", "()", "\\", '{"score": 1.0}',
    '{"score": 1.0, "reason": "", "error": null}', "score: 1.0", "__import__('os')._exit(0)", "exec('1')",
    "def __eq__(self, other): return True", "'; DROP TABLE answers; --", "%s%s%s%n", "../../etc/passwd", "\ud7ff", "𝟎",
    "١٢٣", "ａｂｃ", "\u202e24", "(" * 3000, "[" * 3000, "9" * 5000, "9^9^9^9^9", "1/0", "0/0", "1e999999999",
    r"\frac{1}{", r"\frac{}{}", "a" * 20000, "<answer>" * 2000, "answer is " * 2000,
]  # fmt: skip

RIGHT: dict[str, list[tuple[str, str]]] = {
    "exact": [
        ("Paris", content)
        for content in (
            "Paris", " Paris ", "Paris.", "**Paris**", "`Paris`", "Some steps.\n\nParis\n", "The answer is Paris.",
            "Answer: Paris", "**Answer:** Paris", "Final answer: Paris", r"\boxed{Paris}", r"so \boxed{Paris}.",
            "<answer>Paris</answer>", "<answer>\nParis\n</answer>", "“Paris”", '"Paris"', "*Paris*", "_Paris_",
            "The answer is: **Paris**.", "The final answer is Paris. It lies on the Seine.", "First Rome.\nThen\nParis",
            r"\boxed{Lyon}, no, \boxed{Paris}",
        )
    ],
    "number": [
        ("1500 m", "1.5 km"), ("1500 m", r"\boxed{1.5\text{ km}}"), ("1.5 km", "The distance is 1,500 metres."),
        ("42", "42"), ("42", "42 legs"), ("42", "42.0"), ("42", "The answer is 42 legs, since 40 + 2 is."),
        ("0.5", "50%"), ("50", "50%"), ("50%", "0.5"), ("50%", "50"), ("1/2", r"\boxed{\frac{1}{2}}"),
        ("1500", r"$1.5 \times 10^3$"),
        ("1500", "1.5e3"), ("20 m/s", "72 km/h"), ("20 m/s", "72 kilometers per hour"), ("2 h", "120 minutes"),
        ("9.81 m/s^2", r"9.81\,\text{m/s}^2"), ("1 h", "3600 s"), ("100 °C", "212 °F"), ("1 kWh", "3.6 MJ"),
        ("-5", "−5"), ("2.5", "2 1/2"), ("1000000", "1,000,000"), ("5 L", "5000 cm³"), ("12 inches", "1 foot"),
        ("45", "$45"), ("3 m^2", "30000 cm^2"), ("1 N", "1 kg m/s^2"), ("7", "x = 7"), ("5", "five"),
        ("5000000", "five million"), ("5 km", "about 5 km long"),
    ],
    "math": [
        ("1/2", "0.5"), ("1/2", r"\boxed{\frac{1}{2}}"), ("1/2", r"\frac12"), ("42", "42"), ("42", "42.0"),
        ("42", "So it is 42."), ("0.5", "1/2"), (r"2\sqrt{3}", r"\sqrt{12}"), ("x+1", "1+x"), ("x+1", "Answer: $1+x$"),
        ("(x+1)^2", "x^2+2x+1"), (r"\frac{\pi}{2}", r"\boxed{\pi/2}"), ("-3", "−3"), ("1000", "1,000"), ("8", "2^3"),
        ("x^2-1", r"\boxed{(x-1)(x+1)}"), ("3.0", "3"), ("Paris", "paris"), ("7", r"\boxed{x = 7}"), ("4",
        r"\boxed{2+2}"),
        (r"\{1,2\}", r"\boxed{\{2,1\}}"),
    ],
    "choice": [
        ("B", content)
        for content in (
            "B", "b", "(B)", "B.", "**B**", r"\boxed{B}", r"\boxed{\text{B}}", "The answer is B.", "[B]", "Option B",
            "The answer is (B) Lyon.", "Answer: B) Lyon", "<answer>B</answer>", "Lyon", "lyon.", "B - Lyon",
            "The correct answer is option B.", "Steps...\n\nB: Lyon", "Answer: (B) because it has two rivers",
            "The answer is: **B. Lyon**", "The final answer is $B$",
        )
    ],
    "regex": [
        (r"[A-Z]{2}-\d{4}", content)
        for content in (
            "AB-1234", " AB-1234\n", "AB-1234.", "**AB-1234**", "`AB-1234`", "It is\nAB-1234", r"\boxed{AB-1234}",
            "<answer>AB-1234</answer>", "Answer: AB-1234", "The answer is ZZ-0000.", "XY-9999", "$AB-1234$",
            '"AB-1234"', "Answer: **AB-1234**", "Final answer: AB-1234", "the answer was AB-1234", "answer = AB-1234",
            "*AB-1234*", "One.\nTwo.\nQQ-0001", r"\boxed{QQ-0001} it is",
        )
    ],
    "json_schema": [
        ('{"type": "object", "required": ["n"], "properties": {"n": {"type": "integer", "minimum": 1}}}', content)
        for content in (
            '{"n": 1}', '{"n":1}', ' {"n": 1}\n', '{"n": 2.0}', '{"n": 1, "m": null}', '{"n": 99999999999999999999}',
            '```json\n{"n": 1}\n```', '```\n{"n": 1}\n```', 'Here:\n```json\n{"n": 1}\n```\nDone.', '{\n "n": 3\n}',
            '```json\n{"n": 0}\n```\nbetter\n```json\n{"n": 4}\n```', '{"m": {"n": []}, "n": 7}', '{"n": 1, "é": "ü"}',
            '{"n": 10}', '{"n": 1e2}', '{"\\u006e": 1}', '```JSON\n{"n": 1}\n```', '\t{"n": 5}', '{"n": 6}',
            '{"n": 8, "x": "a\\nb"}',
        )
    ],
}  # fmt: skip

WRONG: dict[str, list[tuple[str, str]]] = {
    "exact": [("Paris", c) for c in ("paris", "PARIS", "Pariss", "Pari", "Paris or Lyon", "not Paris", "Lyon",
    "P a r i s")],
    "number": [
        ("1500 m", "1500 km"), ("1500 m", "1500 kg"), ("15", "1,5"), ("1.5", "1,5"), ("42", "4 2"), ("42", "42.1"),
        ("42", "-42"), ("42", "142"), ("42", "420"), ("42", "42 or 43"), ("43", "42 or 43"), ("42", "Answer: 42 or 43"),
        ("42", "42,42"), ("42", "4.2e2"), ("0.5", "50"), ("1/2", "2/1"), ("20 m/s", "20 km/h"),
        ("1 h", "1 min"), ("5", "0x5"), ("5", "5/1/1"), ("5", "1.5"), ("5", ".5"), ("5", "5.5.5"),
        ("5", "2^5"), ("5", "x5"), ("5", "5x"), ("5 kg", "5 apples"), ("5 kg", "5 g"), ("42", "[42, 43]"),
        ("100 °C", "100 °F"), ("5", "5^2"), ("5", "5!"), ("5", r"\sqrt{5}"), ("5", "5i"), ("5", "5 ± 3"), ("5", "<5"),
        ("5", ">= 5"), ("5", "5*5"), ("5", "5+1"), ("5", "5-ish"), ("5", "not 5"), ("5", "5:30"), ("5", "1:5"),
        ("12", "twelve dozen"), ("5", "up to 5"), ("5", "5+"), ("5", "-|5|"), ("5", "nearly 5"),
        ("5", "between 4 and 5"), ("5", "4 to 5"),
    ],
    "math": [
        ("42", "43"), ("42", "-42"), ("42", "4 2"), ("1", "x+1"), ("x+1", "1"), ("x+1", "x"), ("5", ".5"),
        ("15", "1,5"),
        ("1/2", "2"), ("1/2", "1"), (r"2\sqrt{3}", r"\sqrt{3}"), (r"2\sqrt{3}", r"\boxed{\frac{1}{"), ("x^2", "x^3"),
        (r"\pi", "3.14"), ("Paris", "Lyon"), ("8", "2^4"), ("0.1", "0.2"), ("10", "1e2"), (r"\{1,2\}", r"\{1,3\}"),
        ("7", "7 or 8"), ("(1,2)", "(2,1)"), ("100", "100000"), ("3", "3x"),
        ("12", "twelve dozen"), ("5", "up to 5"), ("5", "5+"), ("5", "-|5|"),
        ("5 mW", "5 MW"), (r"\Delta", r"\delta"), ("5 mm", "5 Mm"), ("x", "X"), (r"\Gamma x", r"\gamma x"),
    ],
    "choice": [
        ("B", c) for c in (
            "A", "C", "D", "E", "Z", "A and B", "A or B", "(A) or (B)", "B or C", "B, C", "B/C", "BC", "AB", "not B",
            "It is not B", "Paris", "Rome", "Paris or Lyon", "Lyon or Paris", "B) Paris", "A) Lyon", "(B) Rome", "2",
            "none of the above", "all", "ABCD", "A B C D", "B? no, C", "Answer: B or (C)", "B and also D", "Lyonnais",
            "L", "b c", "both A and B", r"\boxed{A}", r"\boxed{B, C}", "The answer is A, not B", "The answer is not B",
            "<answer>C</answer> B", "I think B is wrong", "Either B or C", "(B)(C)", "everything but B", "Β", "В",
        )
    ],
    "regex": [
        (r"[A-Z]{2}-\d{4}", c) for c in (
            "AB-123", "AB-12345", "ab-1234", "ABC-1234", "AB-1234 or so", "xAB-1234", "AB1234", "AB-١٢٣", "AB-1234\nno",
            "AB - 1234", "AB-1234!", "[A-Z]{2}-\\d{4}", ".*", "AB-1234 CD-5678", r"\boxed{AB-1}", "Answer: no AB-1234",
        )
    ],
    "json_schema": [
        ('{"type": "object", "required": ["n"], "properties": {"n": {"type": "integer", "minimum": 1}}}', c) for c in (
            '{"n": 0}', '{"n": "1"}', '{"n": 1.5}', '{"n": true}', '{"n": null}', '{"m": 1}', '[{"n": 1}]', '"n"', "1",
            '{"n": 1', '{"n": 1}}', '{"n": 1} {"n": 1}', "{'n': 1}", "{n: 1}", '{"n": 1,}', '{"n": NaN}', '{"n": 01}',
            '{"n": 1, "n": 0}', '{"n": 0, "n": 1}', '{"n": 1} // yes', 'The answer is {"n": 1}',
            '```json\n{"n": 0}\n```',
            '```json\n{"n": 1}\n```\n```json\n{"n": 0}\n```', '{"n": Infinity}', '{"N": 1}', '{"n": [1]}', '{"n": -1}',
            '{"n": {"n": 1}}', "n: 1", "<n>1</n>", '{"n": 1e-1}', '{"$ref": "#"}', '{"required": ["n"]}',
        )
    ],
}  # fmt: skip

# Problems of one kind, so that each one's right answer can be given to all others.
DISTINCT = {
    "exact": ["Paris", "Lyon", "Rome", "Berlin", "Oslo", "Bern", "Wien", "Praha"],
    "number": ["1 m", "2 km", "3 kg", "4 s", "5", "6.5", "7/8", "-9"],
    "math": ["1", "2", "1/3", "x", "x+1", r"\sqrt{5}", r"\pi", "x^2"],
    "choice": ["A", "B", "C", "D"],
    "regex": [r"a+1", r"b+2", r"c+3", r"d+4"],
}
CITIES = ["Paris", "Lyon", "Rome", "A city in France"]


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader(timeout_s=20) as grader:
        yield grader


def problem(kind: str, answer: str | None, **metadata: object) -> Problem:
    metadata = {"choices": CITIES} | metadata if kind == "choice" else metadata
    return Problem("id", "question?", answer, "test", kind, metadata)


def grade_many(grader: Grader, items: Iterable[tuple[Problem, str]]) -> list[Grade]:
    with ThreadPoolExecutor(grader.n_workers) as threads:
        return list(threads.map(lambda item: grader.grade(*item), items))


def grade_all(grader: Grader, kind: str, pairs: list[tuple[str, str]]) -> list[tuple[str, str, Grade]]:
    grades = grade_many(grader, ((problem(kind, gold), content) for gold, content in pairs))
    return [(*pair, grade) for pair, grade in zip(pairs, grades, strict=True)]


@pytest.mark.parametrize("kind", sorted(RIGHT))
def test_right_answers_in_many_forms(grader: Grader, kind: str) -> None:
    assert len(RIGHT[kind]) >= 20
    graded = grade_all(grader, kind, RIGHT[kind])
    assert [(gold, content, grade) for gold, content, grade in graded if grade.verdict != "right"] == []
    assert {(grade.verdict_by, grade.score) for *_, grade in graded} == {("grader", 1.0)}


@pytest.mark.parametrize("kind", sorted(WRONG))
def test_no_wrong_malformed_or_hostile_answer_is_right(grader: Grader, kind: str) -> None:
    gold = RIGHT[kind][0][0]
    pairs = WRONG[kind] + [(gold, content) for content in HOSTILE]
    assert len(pairs) >= 50
    graded = grade_all(grader, kind, pairs)
    assert [(gold, content[:60]) for gold, content, grade in graded if grade.verdict == "right"] == []
    assert {grade.verdict_by for *_, grade in graded if grade.verdict == "unknown"} <= {"none"}
    # Unknown is for what cannot be told, not the way out: nearly everything is plainly wrong.
    assert sum(grade.verdict == "wrong" for *_, grade in graded) > len(pairs) / 2


@pytest.mark.parametrize("kind", sorted(DISTINCT))
def test_the_right_answer_to_another_problem_is_not_right(grader: Grader, kind: str) -> None:
    golds = DISTINCT[kind]
    said = [gold.replace("+", "") for gold in golds] if kind == "regex" else golds
    pairs = [(gold, answer) for gold in golds for answer in said]
    graded = grade_all(grader, kind, pairs)
    right = [(gold, content) for gold, content, grade in graded if grade.verdict == "right"]
    assert right == list(zip(golds, said, strict=True))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_gym_answers_to_other_problems_and_hostile_ones(grader: Grader) -> None:
    import reasoning_gym

    by_answer = {entry["answer"]: entry for entry in reasoning_gym.create_dataset("chain_sum", size=20, seed=1)}
    entries = list(by_answer.values())[:10]
    problems = [Problem("id", e["question"], e["answer"], "t", "gym:chain_sum", e["metadata"]) for e in entries]
    assert len({p.answer for p in problems}) == 10
    pairs = [(p, str(other.answer)) for p in problems for other in problems]
    verdicts = [grade.verdict for grade in grade_many(grader, pairs)]
    assert [verdicts[i * 10 + j] == "right" for i in range(10) for j in range(10)] == [
        i == j for i in range(10) for j in range(10)
    ]
    hostile = grade_many(grader, ((problems[0], content) for content in HOSTILE))
    assert [c[:60] for c, grade in zip(HOSTILE, hostile, strict=True) if grade.verdict == "right"] == []
    forms = ["{}", "The answer is {}.", r"\boxed{{{}}}", "So it is {}.", "<answer>{}</answer>", "**{}**", "= {}"]
    right = [(p, form.format(p.answer)) for p in problems[:3] for form in forms]
    assert len(right) >= 20
    assert {grade.verdict for grade in grade_many(grader, right)} == {"right"}


@pytest.mark.parametrize(
    ("kind", "answer", "metadata", "content", "reason"),
    [
        ("exact", " ", {}, "Paris", "reference answer is empty"),
        ("number", "a few", {}, "5", "not a number"),
        ("number", "5 blobs/s", {}, "5", "not a number"),
        ("number", "5", {}, "5", ""),
        ("math", "1/3", {}, r"\boxed{0.3333}", "rounded"),
        ("math", r"\pi", {}, r"\boxed{3.1416}", "rounded"),
        ("math", "Paris", {}, "Lyon", "not mathematics"),
        ("math", None, {}, "4", "no reference"),
        ("choice", "E", {}, "A", "not among the options"),
        ("choice", "A", {"choices": ["x", "x"]}, "A", "two choices are the same"),
        ("choice", "A", {"choices": 7}, "A", "neither a list"),
        ("regex", "(", {}, "(", "is broken"),
        ("regex", None, {}, "a", "no reference"),
        ("json_schema", '{"type": "thing"}', {}, "1", "schema is broken"),
        ("json_schema", "{", {}, "1", "cannot read"),
        ("json_schema", '{"$ref": "http://127.0.0.1:9/s.json"}', {}, "1", "schema is broken"),
        ("json_schema", None, {}, "1", "no schema"),
        ("json_schema:nowhere.json", None, {}, "1", "cannot read"),
        ("python", None, {}, "x = 1", "no tests"),
    ],
)
def test_what_cannot_be_told_is_unknown_with_a_reason(
    grader: Grader, kind: str, answer: str | None, metadata: dict[str, object], content: str, reason: str
) -> None:
    grade = grader.grade(problem(kind, answer, **metadata), content)
    assert grade.verdict == ("unknown" if reason else "right")
    assert reason in grade.reason


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("exact:upper", "'upper'"),
        ("number:tolerance=much", "'tolerance=much'"),
        ("number:slack=1", "'slack=1'"),
        ("number:absolute=1e999", "'absolute=1e999'"),
        ("number:absolute=1e999999999", "'absolute=1e999999999'"),
        ("number:tolerance=-1", "'tolerance=-1'"),
        ("number:tolerance=nan", "'tolerance=nan'"),
        ("math:tolerance=", "'tolerance='"),
        ("number:units=blobs", "'blobs'"),
        ("regex:(", "'('"),
        ("python:fast", "'fast'"),
    ],
)
def test_an_invalid_argument_is_an_error_at_once(grader: Grader, kind: str, named: str) -> None:
    with pytest.raises(UsageError, check=lambda error: error.code == "bad-grader" and named in error.message):
        grader.grade(problem(kind, "5"), "5")


def test_a_pattern_that_never_ends_is_unknown_and_its_worker_replaced() -> None:
    with Grader(timeout_s=1.0, n_workers=1) as grader:
        assert grader.grade(problem("regex:(a+)+b", None), "a" * 60).verdict == "unknown"
        assert grader.grade(problem("regex:(a+)+b", None), "aab").verdict == "right"


@pytest.mark.parametrize(
    ("grader_name", "gold", "content", "verdict"),
    [
        ("number:tolerance=0.01", "100", "100.9", "right"),
        ("number:tolerance=0.01", "100", "101.1", "wrong"),
        ("number:absolute=0.5", "100", "100.5", "right"),
        ("number:absolute=0.5", "100", "100.6", "wrong"),
        ("number:units=km,absolute=0.1", "1.5", "1600 m", "right"),
        ("number:units=km,absolute=0.1", "1.5", "1601 m", "wrong"),
        ("number:units=km", "1.5", "1.5", "right"),
        ("number:tolerance=0.01", "-100", "-99.1", "right"),
        ("exact:ignore_case", "Paris", "PARIS", "right"),
        ("regex:[ab]+", None, "abba", "right"),
        ("regex:[ab]+", None, "abc", "wrong"),
    ],
)
def test_arguments(grader: Grader, grader_name: str, gold: str | None, content: str, verdict: str) -> None:
    assert grader.grade(problem(grader_name, gold), content).verdict == verdict


def test_a_schema_and_a_reference_document_must_both_agree(grader: Grader, tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text(json.dumps({"type": "object"}))
    asked = problem(f"json_schema:{tmp_path / 's.json'}", '{"a": [1, true], "b": 2}')
    verdicts = [
        grader.grade(asked, content).verdict
        for content in ('{"b": 2.0, "a": [1, true]}', '{"b": 2, "a": [true, 1]}', '{"b": 2, "a": [1, 1]}', '{"b": 2}')
    ]
    assert verdicts == ["right", "wrong", "wrong", "wrong"]
    assert grader.grade(problem("json_schema", None, schema={"type": "integer"}), "3").verdict == "right"


def test_the_users_own_grader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_checks.py").write_text(
        """
def judge(problem, content):
    print("talks")
    if content == "raise":
        raise ValueError("no")
    if content == "hang":
        while True: pass
    if content == "die":
        import os; os._exit(0)
    return {"none": None, "half": 0.5, "two": 2, "nan": float("nan"), "text": "right", "true": True, "one": 1.0}.get(
        content, content == problem["metadata"]["wanted"] + problem["question"]
    )
"""
    )
    monkeypatch.chdir(tmp_path)
    asked = problem("my_checks:judge", None, wanted="yes ")
    expected = {
        "yes question?": "right", "no question?": "wrong", "true": "right", "one": "right", "half": "wrong",
        "none": "unknown", "two": "unknown", "nan": "unknown", "text": "unknown", "raise": "unknown",
        "hang": "unknown", "die": "unknown", "": "wrong",
    }  # fmt: skip
    with Grader(timeout_s=1.0, n_workers=1) as grader:
        assert {content: grader.grade(asked, content).verdict for content in expected} == expected
        for name in ("my_checks:nothing", "no_such_module:judge"):
            with pytest.raises(UsageError, check=lambda error: error.code == "bad-grader"):
                grader.grade(problem(name, None), "x")
        with pytest.raises(UsageError, check=lambda error: error.code == "no-such-grader" and "exakt" in error.message):
            grader.grade(problem("exakt", "x"), "x")


def test_many_threads_share_a_grader() -> None:
    numbers = list(range(200))
    with Grader(n_workers=2) as grader:
        grades = grade_many(grader, ((problem("number", str(i)), str(i if i % 3 else i + 1)) for i in numbers))
        assert [grade.verdict == "right" for grade in grades] == [bool(i % 3) for i in numbers]
        assert [grade.answer for grade in grades] == [str(i if i % 3 else i + 1) for i in numbers]
        assert 1 <= len(grader.processes) <= 2
