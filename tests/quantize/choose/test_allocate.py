"""The knapsack against every possible choice, and the other small decisions."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
from gguf import GGMLQuantizationType as Type

from deepdistill.errors import UsageError
from deepdistill.quantize.choose.allocate import Choice, Item, efficient, promoted, solve, target_bytes


def choice(n_bytes: int, damage: float) -> Choice:
    return Choice(Type.Q4_0, n_bytes, damage, damage)


def random_items(seed: int, unit: int) -> list[Item]:
    rng = random.Random(seed)
    items = []
    for i in range(6):
        sizes = sorted(rng.sample(range(1, 30), 4))
        damages = sorted((rng.random() ** 3 for _ in sizes), reverse=True)
        items.append(Item(f"t{i}", tuple(choice(unit * s, d) for s, d in zip(sizes, damages, strict=True))))
    return items


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("unit", [1, 6912])
def test_no_other_choice_does_less_damage(seed: int, unit: int) -> None:
    items = random_items(seed, unit)
    least, most = (sum(item.choices[i].n_bytes for item in items) for i in (0, -1))
    for budget in (least, (least + most) // 2, most - 1, most + 10 * unit):
        found = solve(items, budget)
        assert [one in item.choices for one, item in zip(found, items, strict=True)] == [True] * 6
        assert sum(one.n_bytes for one in found) <= budget
        fitting = (c for c in itertools.product(*(i.choices for i in items)) if sum(o.n_bytes for o in c) <= budget)
        best = min(sum(one.damage for one in combination) for combination in fitting)
        assert sum(one.damage for one in found) == pytest.approx(best)


def test_a_budget_below_the_smallest_types_is_refused() -> None:
    items = random_items(0, 1000)
    least = sum(item.choices[0].n_bytes for item in items)
    with pytest.raises(UsageError, check=lambda error: error.code == "budget-too-small"):
        solve(items, least - 1)


def test_sizes_without_a_common_divisor_still_fit() -> None:
    rng = random.Random(3)
    items = [
        Item(f"t{i}", tuple(choice(10**7 * k + rng.randrange(10**6) * 2 + 1, 1 / k) for k in range(1, 5)))
        for i in range(20)
    ]
    budget = int(2.5e7 * 20)
    found = solve(items, budget)
    assert 0.98 * budget < sum(one.n_bytes for one in found) <= budget


def test_a_choice_is_ruled_out_by_three_that_beat_it() -> None:
    best, *others = (choice(10 + i, 1 + i / 10) for i in range(4))
    larger = choice(30, 0.4)
    assert efficient([larger, *others, best]) == (best, *others[:2], larger)


def item_of(name: str, *errors: float) -> Item:
    sizes = {Type.Q4_0: 2, Type.Q4_1: 3, Type.Q8_0: 6}
    return Item(name, tuple(Choice(t, n, e) for (t, n), e in zip(sizes.items(), errors, strict=False)))


def test_the_worst_is_raised_first() -> None:
    damages = {"calm": (0.10, 0.09), "hurt": (0.50, 0.10, 0.01)}
    items = [replace(item_of(name), choices=weighed(item_of(name, *of))) for name, of in damages.items()]
    lowest = [item.choices[0] for item in items]
    assert [one.n_bytes for one in promoted(items, lowest, n_more=1, most=99)] == [2, 3]
    assert [one.n_bytes for one in promoted(items, lowest, n_more=0, most=99)] == [2, 3], "one step at least"
    assert [one.n_bytes for one in promoted(items, lowest, n_more=0, most=0)] == [2, 2], "within what there is"
    assert [one.n_bytes for one in promoted(items, lowest, n_more=100, most=100)] == [3, 6]
    stale = [replace(choice, damage=0.0) for choice in lowest]
    assert [one.n_bytes for one in promoted(items, stale, n_more=1, most=99)] == [2, 3], "old damages do not count"
    top = [item.choices[-1] for item in items]
    assert promoted(items, top, n_more=100, most=100) == top


def weighed(item: Item) -> tuple[Choice, ...]:
    return tuple(replace(choice, damage=choice.error) for choice in item.choices)


def test_a_target_is_bound_by_memory_speed_and_what_is_of_use() -> None:
    assert target_bytes("phone", 135_000_000) == int(8.5 * 135_000_000 / 8)
    assert target_bytes("phone", 7_000_000_000) == 750_000_000
    assert target_bytes("laptop", 7_000_000_000) == pytest.approx(50e9 / 12, abs=1)
