"""The knapsack against every possible choice, and the other small decisions."""

from __future__ import annotations

import itertools
import random

import pytest
from gguf import GGMLQuantizationType as Type

from deepdistill.errors import UsageError
from deepdistill.quantize.budget import Choice, Item, efficient, promoted, scaled, solve, target_bytes
from deepdistill.quantize.sensitivity import between


def choice(n_bytes: int, damage: float, *, error: float = 0.0, is_measured: bool = True) -> Choice:
    return Choice(Type.Q4_0, n_bytes, error or damage, damage, is_measured)


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
    with pytest.raises(UsageError, match="the smallest types take"):
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


def test_only_choices_that_nothing_beats_are_kept() -> None:
    a, worse, b, larger = choice(10, 1.0), choice(12, 1.1), choice(20, 0.5), choice(30, 0.5)
    assert efficient([larger, b, worse, a]) == (a, b)


def test_what_was_not_measured_is_scaled_by_its_error() -> None:
    item = Item(
        "t",
        (
            choice(1, 0, error=8.0, is_measured=False),
            choice(2, 0.4, error=4.0),
            choice(3, 0, error=1.0, is_measured=False),
        ),
    )
    assert [one.damage for one in scaled(item).choices] == pytest.approx([0.8, 0.4, 0.1])


def test_layers_between_cost_as_their_neighbours_do() -> None:
    def item(layer: int, damage: float | None) -> Item:
        one = choice(1, damage or 0.0, error=1.0, is_measured=damage is not None)
        return Item(f"blk.{layer}.ffn_up.weight", (one,))

    found = between([item(0, 0.01), item(1, None), item(2, 0.04), Item("x", (choice(1, 0.3, is_measured=False),))])
    assert [one.choices[0].damage for one in found] == pytest.approx([0.01, 0.02, 0.04, 0.3])


def test_the_worst_is_raised_first() -> None:
    items = [
        Item("calm", (choice(10, 0.10), choice(20, 0.09))),
        Item("hurt", (choice(10, 0.50), choice(20, 0.10), choice(40, 0.01))),
    ]
    lowest = [item.choices[0] for item in items]
    assert [one.n_bytes for one in promoted(items, lowest, 10)] == [10, 20]
    assert [one.n_bytes for one in promoted(items, lowest, 1)] == [10, 20], "one step at least"
    assert [one.n_bytes for one in promoted(items, lowest, 100)] == [20, 40]
    top = [item.choices[-1] for item in items]
    assert promoted(items, top, 100) == top


def test_a_target_is_bound_by_memory_speed_and_what_is_of_use() -> None:
    assert target_bytes("phone", 135_000_000) == int(8.5 * 135_000_000 / 8)
    assert target_bytes("phone", 7_000_000_000) == 750_000_000
    assert target_bytes("laptop", 7_000_000_000) == pytest.approx(50e9 / 12, abs=1)
    with pytest.raises(UsageError, match="no target"):
        target_bytes("watch", 1)
