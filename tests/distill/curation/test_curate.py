"""Each filter takes what it is for and nothing else."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Iterable, Iterator
from typing import Any

import pytest

from deepdistill.distill.curation.curate import select
from deepdistill.distill.curation.filters import FILTERS
from deepdistill.distill.problems.load import load_problems
from deepdistill.distill.problems.split import bucket_of, question_hash
from deepdistill.distill.recipe.gathering import CurationRecipe
from deepdistill.distill.records import TeacherInfo, Trace, Usage
from deepdistill.errors import UsageError
from deepdistill.localrun.core.settings import build

VOCABULARY = [f"{a}{b}" for a in ("ba", "ko", "ri", "mu", "te") for b in ("lan", "pir", "son", "dek", "vum", "gra")]
ANYTHING = CurationRecipe(
    train_bucket=False,
    verified=False,
    whole=False,
    reasoning=False,
    max_repeated=None,
    max_pass_rate=None,
    contamination_ngram=None,
    similarity=None,
    keep=None,
)


def prose(seed: int, n: int = 40) -> str:
    """Return words that no two seeds have in the same order."""
    rng = random.Random(seed)
    return " ".join(rng.choice(VOCABULARY) for _ in range(n))


def train_question(seed: int, n: int = 30) -> str:
    """Return a question of the training bucket."""
    return next(q for q in (prose(seed + 1000 * i, n) for i in range(99)) if bucket_of(q) == "train")


HELD_OUT = next(text for text in map(prose, range(99)) if bucket_of(text) == "test")
_made = iter(range(10**9))


def trace(question: str | int = 0, **fields: Any) -> Trace:
    """Return a right trace with reasoning of its own; a number asks the training question of that number."""
    number = next(_made)
    text = train_question(question) if isinstance(question, int) else question
    made = Trace(
        id=f"{number:032x}",
        problem_id=question_hash(text)[:16],
        messages=[{"role": "user", "content": text}],
        reasoning_content=prose(10_000 + number),
        content="so it is 7",
        answer="7",
        verdict="right",
        verdict_by="grader",
        finish_reason="stop",
        usage=Usage(30, 60, 50),
        teacher=TeacherInfo("teacher", "endpoint"),
        sampling={},
        seconds=1.0,
    )
    source = fields.pop("source", None)
    made = dataclasses.replace(made, **fields)
    if source is not None:
        object.__setattr__(made, "source", source)
    return made


def curate(
    traces: list[Trace], settings: CurationRecipe | None = None, **more: Any
) -> tuple[list[Trace], dict[str, Any]]:
    """Select from traces in memory; return those that stay, and the record."""
    selection = select(lambda: traces, settings, **more)
    return list(selection), selection.record


def dropped(traces: Iterable[Trace], changes: CurationRecipe | None = None, **more: Any) -> dict[str, int]:
    """Return what the filters took."""
    counts: dict[str, int] = curate(list(traces), changes, **more)[1]["dropped"]
    return counts


def test_a_good_trace_of_each_problem_is_kept_in_order() -> None:
    traces = [trace(i) for i in range(20)]
    kept, record = curate(traces)
    assert kept == traces
    assert (record["traces"], record["problems"], record["kept"], record["dropped"]) == (20, 20, 20, {})


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("wrong", {"verdict": "wrong"}),
        ("unknown", {"verdict": "unknown", "verdict_by": "none"}),
        ("cut_off", {"finish_reason": "length"}),
        ("cut_off", {"finish_reason": "error"}),
        ("looped", {"finish_reason": "loop"}),
        ("looped", {"reasoning_content": "start " + "round and round it goes " * 40}),
        ("looped", {"reasoning_content": prose(1, 500) + " again and again" * 30, "content": "again"}),
        ("no_answer", {"content": " \n"}),
        ("no_reasoning", {"reasoning_content": None}),
        ("no_reasoning", {"reasoning_content": " \n"}),
        ("stray_tags", {"content": "hm </think> 7"}),
        ("stray_tags", {"reasoning_content": "<think> hm"}),
        ("held_out", {"messages": [{"role": "user", "content": HELD_OUT}]}),
    ],
)
def test_a_filter_takes_its_trace_and_can_be_switched_off(name: str, fields: dict[str, Any]) -> None:
    bad = trace(2, **fields)
    kept, record = curate([trace(1), bad, trace(3)])
    assert record["dropped"] == {name: 1}
    assert bad not in kept
    assert record["examples"][name]["id"] == bad.id
    assert set(record["dropped"]) <= set(FILTERS) == set(record["why"])
    assert bad in curate([trace(1), bad, trace(3)], ANYTHING)[0]


def test_lengths_are_the_teachers_tokens_and_words_where_it_counted_none() -> None:
    traces = [trace(i, usage=Usage(1, n, n)) for i, n in enumerate((9, 10, 20, 21))]
    assert dropped(traces, CurationRecipe(min_tokens=10, max_trace_tokens=20)) == {"too_short": 1, "overlong": 1}
    uncounted = trace(5, usage=Usage(0, 0, 0), reasoning_content="one two three", content="four")
    assert dropped([uncounted], CurationRecipe(min_tokens=4, max_trace_tokens=4)) == {}
    assert dropped([uncounted], CurationRecipe(min_tokens=5)) == {"too_short": 1}


def test_difficulty_is_the_students_own_pass_rate() -> None:
    traces = [trace(i) for i in range(4)]
    rates = {traces[0].problem_id: 1.0, traces[1].problem_id: 0.5, traces[2].problem_id: 0.0}
    assert dropped(traces, pass_rate=rates) == {"too_easy": 1}
    band = CurationRecipe(min_pass_rate=0.1, max_pass_rate=0.6)
    kept, record = curate(traces, band, pass_rate=rates)
    assert record["dropped"] == {"too_easy": 1, "too_hard": 1}
    assert kept == [traces[1], traces[3]]  # of the last the rate is not known
    assert dropped(traces, CurationRecipe(max_pass_rate=None), pass_rate=rates) == {}


def test_votes_count_where_no_grader_judged_and_where_they_are_named() -> None:
    vote = trace(1, verdict="unknown", verdict_by="vote")
    judge = trace(2, verdict="unknown", verdict_by="judge")
    disputed = trace(3, verdict="unknown", verdict_by="vote")
    graded = trace(3, verdict="wrong")  # comes later and tells that problem 3 has an answer
    traces = [vote, judge, disputed, graded]
    assert curate(traces)[0] == [vote, judge]
    assert dropped(traces) == {"wrong": 1, "unknown": 1}
    assert curate(traces, CurationRecipe(accept=("vote",)))[0] == [vote, disputed]
    assert curate(traces, CurationRecipe(accept=()))[0] == []
    with pytest.raises(UsageError, check=lambda error: error.code == "bad-settings"):
        build(CurationRecipe, {"accept": ["hope"]})


def test_the_shortest_of_a_problem_are_kept_and_a_share_of_long_ones() -> None:
    lengths = (50, 20, 40, 30)
    traces = [trace(i, reasoning_content=prose(99 * i + n, n)) for i in range(200) for n in lengths]

    def kept_lengths(seed: int = 0, **changes: Any) -> list[int]:
        kept, _ = curate(traces, CurationRecipe(**changes), seed=seed)
        return [len(str(t.reasoning_content).split()) for t in kept]

    assert kept_lengths() == [20] * 200
    assert sorted(kept_lengths(keep=2)) == [20] * 200 + [30] * 200
    assert dropped(traces) == {"over_problem_cap": 600}
    mixed = kept_lengths(long_share=0.2)
    assert set(mixed) == {20, 50}
    assert 20 <= mixed.count(50) <= 60  # 40 expected, five standard deviations and more
    assert kept_lengths(long_share=1.0, keep=2).count(50) == 200
    assert len(kept_lengths(keep=None)) == 800
    assert kept_lengths(long_share=0.2, seed=1) != mixed == kept_lengths(long_share=0.2)


def test_a_cap_on_each_source_takes_the_same_ones_in_any_order() -> None:
    traces = [trace(i, source="big" if i % 4 else "small") for i in range(40)]
    kept, record = curate(traces, CurationRecipe(per_source=15))
    assert record["dropped"] == {"over_source_cap": 15}
    assert sum(t in kept for t in traces[::4]) == 10
    assert {t.id for t in curate(traces[::-1], CurationRecipe(per_source=15))[0]} == {t.id for t in kept}
    assert {t.id for t in curate(traces, CurationRecipe(per_source=15), seed=3)[0]} != {t.id for t in kept}


def changed(text: str, n: int, seed: int = 0) -> str:
    """Return the text with n of its words replaced."""
    words, rng = text.split(), random.Random(seed)
    for i in rng.sample(range(len(words)), n):
        words[i] = "otherwise"
    return " ".join(words)


def train_variant(text: str, n: int) -> str:
    return next(v for v in (changed(text, n, seed) for seed in range(99)) if bucket_of(v) == "train")


def test_nearly_the_same_question_is_asked_once() -> None:
    text = train_question(1, 80)
    near, far = train_variant(text, 1), train_variant(text, 30)
    traces = [trace(text), trace(near), trace(far)]
    kept, record = curate(traces)
    assert record["dropped"] == {"same_question": 1}
    assert kept == [traces[0], traces[2]]
    assert record["examples"]["same_question"]["id"] == traces[1].id
    assert record["examples"]["same_question"]["like"] == traces[0].id
    assert dropped(traces, CurationRecipe(similarity=1.0)) == {}
    # Nobody takes the place of a question whose own traces are no good.
    assert curate([trace(text, verdict="wrong"), traces[1]])[0] == [traces[1]]


def test_the_same_question_in_other_words_of_the_split_is_one_problem() -> None:
    text = train_question(1)
    assert dropped([trace(text), trace("  " + text.upper().replace(" ", "\n"))]) == {"over_problem_cap": 1}


def test_nearly_the_same_trace_is_kept_once_but_not_with_other_numbers() -> None:
    text = prose(5, 80)
    both = [trace(1, reasoning_content=text), trace(2, reasoning_content=changed(text, 1))]
    assert dropped(both) == {"same_trace": 1}
    assert dropped(both, CurationRecipe(similarity=1.0)) == {}
    copies = [trace(1, reasoning_content=text), trace(2, reasoning_content=text)]
    assert dropped(copies, CurationRecipe(similarity=1.0)) == {"same_trace": 1}
    other_numbers = [trace(i, reasoning_content=f"{text} {i}") for i in (1, 2)]
    assert dropped(other_numbers) == {}
    other_answers = [trace(i, reasoning_content=f"{text} {word}", answer=word) for i, word in ((1, "yes"), (2, "no"))]
    assert dropped(other_answers) == {}
    same_problem = [trace(1, reasoning_content=f"{text} {i}") for i in (1, 2)]
    assert dropped(same_problem, CurationRecipe(keep=2)) == {"same_trace": 1}


def test_many_questions_may_have_the_same_short_answer() -> None:
    text = "The message is about a payment, so the label is billing."
    labelled = [trace(i, reasoning_content=text, content="billing", answer="billing") for i in (1, 2, 3)]
    assert dropped(labelled) == {}
    assert dropped([labelled[0], labelled[0]], CurationRecipe(keep=2)) == {"same_trace": 1}


def test_a_question_that_shares_eight_words_with_the_evaluation_does_not_train() -> None:
    exam = "A farmer has a wolf, a goat and a cabbage. How does he bring them over the river?"
    eight = f"{prose(1, 12)} Has a wolf a goat and a cabbage {prose(2, 12)}"
    seven = f"{prose(3, 12)} has a wolf, a goat and a {prose(4, 12)}"
    questions = [eight, seven, exam.upper(), "short question"]
    kept, record = curate(
        [trace(q) for q in questions], CurationRecipe(train_bucket=False), evaluation=[exam, "Short question?"]
    )
    assert record["dropped"] == {"contaminated": 3}
    assert [t.messages[0]["content"] for t in kept] == [seven]
    assert "farmer" in record["examples"]["contaminated"]["like_excerpt"]
    off = CurationRecipe(train_bucket=False, contamination_ngram=None)
    assert dropped([trace(q) for q in questions], off, evaluation=[exam]) == {}


@pytest.mark.parametrize("n_eval", [2, 8, 200])
def test_problems_of_one_template_are_neither_duplicates_nor_contaminated(chain_sum: str, n_eval: int) -> None:
    evaluation = [p.question for p in load_problems(chain_sum, "test", n=n_eval, seed=1)]
    problems = load_problems(chain_sum, "train", n=300, seed=1)
    took = dropped([trace(p.question) for p in problems], evaluation=evaluation)
    assert sum(took.values()) <= 3
    leak = CurationRecipe(train_bucket=False)
    leaked = [trace(p.question) for p in problems] + [trace(f"  {evaluation[0].upper()}")]
    assert dropped(leaked, leak, evaluation=evaluation)["contaminated"] >= 1


def test_what_is_read_twice_gives_the_same_and_is_not_held() -> None:
    traces = [trace(i % 30, verdict="wrong" if i % 7 == 0 else "right") for i in range(90)]
    passes: list[int] = []

    def read() -> Iterator[Trace]:
        passes.append(1)
        yield from traces

    selection = select(read, CurationRecipe(keep=2))
    assert len(selection) == selection.record["kept"] == 60
    kept = list(selection)
    assert kept == list(selection) == curate(traces, CurationRecipe(keep=2))[0]
    assert [traces.index(t) for t in kept] == selection.positions.tolist()
    assert json.loads(json.dumps(selection.record)) == selection.record


def test_nothing_at_all() -> None:
    kept, record = curate([], evaluation=["a question"])
    assert (kept, record["traces"], record["kept"], record["dropped"]) == ([], 0, 0, {})
    assert curate([trace(verdict="wrong")], CurationRecipe(per_source=1))[0] == []


def test_hostile_text_passes_through() -> None:
    odd = trace(1, reasoning_content="\ud800 \x00 " + prose(1), content="﷽" * 5)
    question = [{"role": "user", "content": "\udfff"}, {"role": "assistant", "content": "what?"}]
    kept, record = curate([odd, trace(2, messages=question)], CurationRecipe(train_bucket=False))
    assert (len(kept), record["problems"]) == (2, 2)


@pytest.mark.parametrize(
    "bad", [{"similarity": 1.5}, {"long_share": -0.1}, {"keep": 0}, {"per_source": 0}, {"max_repeated": 3}]
)
def test_settings_out_of_range_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(bad)), check=lambda error: error.code == "bad-settings"):
        build(CurationRecipe, bad)
