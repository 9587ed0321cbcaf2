"""The asking loop: what is wanted is asked for once, passes follow each other, and the budget holds it up."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import pytest

from deepdistill.distill.recipe.gathering import CostRecipe
from deepdistill.distill.records import Request
from deepdistill.distill.teachers.asking import Asked, ask_all
from deepdistill.distill.teachers.base import Teacher
from deepdistill.distill.teachers.budget import Budget
from deepdistill.localrun.core.generation import Completion, Sampling


class Echo(Teacher):
    """Answers with the question; "fail" fails. It draws two requests ahead."""

    name, backend = "echo", "endpoint"

    def generate(
        self, requests: Iterable[Request], sampling: Sampling, *, top_logprobs: int = 0
    ) -> Iterator[tuple[int, Completion]]:
        source, ahead = enumerate(requests), list[tuple[int, Request]]()
        while True:
            while len(ahead) < 2 and (drawn := next(source, None)):
                ahead.append(drawn)
            if not ahead:
                return
            index, request = ahead.pop()
            text = request.messages[-1]["content"]
            yield index, Completion(text, None, None, "error" if text == "fail" else "stop", 0, 10, 0, 0.0)


@dataclass
class Texts:
    """Wants each text once, and a follow-up text once another has come."""

    texts: list[str]
    follow_ups: dict[str, str] = field(default_factory=dict)
    begun: list[str] = field(default_factory=list)
    ended: list[tuple[str, float | None]] = field(default_factory=list)

    def wanted(self) -> Iterator[str]:
        return (text for text in list(self.texts) if text not in self.begun)

    def begin(self, item: str) -> Request:
        self.begun.append(item)
        return Request([{"role": "user", "content": item}])

    def end(self, item: str, completion: Completion, cost_usd: float | None) -> None:
        assert completion.content == item
        self.ended.append((item, cost_usd))
        if item in self.follow_ups:
            self.texts.append(self.follow_ups[item])


def test_every_item_is_asked_for_once_also_those_that_an_answer_makes_wanted() -> None:
    asking = Texts(["a", "fail", "b"], {"b": "c", "c": "d"})
    asked = ask_all(Echo(), asking, sampling=Sampling(), budget=Budget(CostRecipe()))
    assert asked == Asked(5, 1, None)
    assert sorted(text for text, _ in asking.ended) == ["a", "b", "c", "d", "fail"]


@pytest.mark.parametrize(("max_usd", "n_asked"), [(3.0, 3), (9.0, 6)])
def test_the_budget_ends_it_and_is_no_reason_if_everything_has_come(max_usd: float, n_asked: int) -> None:
    asking = Texts(list("abcdef"))
    budget = Budget(CostRecipe(price=(0, 1e5), max_usd=max_usd))  # a dollar for each answer of ten tokens
    asked = ask_all(Echo(), asking, sampling=Sampling(max_tokens=10), budget=budget)
    assert (asked.n_asked, asked.stopped is None) == (n_asked, n_asked == 6)
    assert all(cost == pytest.approx(1.0) for _, cost in asking.ended)
    spent = ask_all(Echo(), Texts(["g"]), sampling=Sampling(), budget=Budget(CostRecipe(price=(0, 1), max_usd=1), 1.0))
    assert (spent.n_asked, bool(spent.stopped)) == (0, True)
