from __future__ import annotations

from collections import Counter
from dataclasses import replace

from deepdistill.distill.recipe.training import CurriculumRecipe, TrainingRecipe
from deepdistill.distill.training.curriculum import arrange, counts, estimated, level_of
from deepdistill.distill.training.rows import Row, order_rows

TRAINING = TrainingRecipe(batch_size=4, epochs=2, seed=0)


def rows_at(rate: float | None, n: int, first: int) -> list[tuple[Row, float | None]]:
    return [(Row([1, first + i], 1), rate) for i in range(n)]


def test_levels() -> None:
    rates = [None, 0.0, 0.25, 0.74, 0.75, 1.0]
    settings = CurriculumRecipe()
    assert [level_of(rate, settings) for rate in rates] == ["middle", "hopeless", "middle", "middle", "easy", "easy"]
    assert counts(rates) == {"easy": 2, "middle": 3, "hopeless": 1}


def test_easy_come_less_middle_more_and_hopeless_after_a_head_start() -> None:
    easy, middle, hopeless = rows_at(1.0, 40, 100), rows_at(0.5, 40, 200), rows_at(0.0, 40, 300)
    ordered = arrange([*easy, *middle, *hopeless], TRAINING)
    kinds = [row.input_ids[1] // 100 for row in ordered]
    assert Counter(kinds) == {1: 40, 2: 120, 3: 80}  # in two passes: each easy once, middle 1 + 2 times, hopeless twice
    assert set(kinds[:12]) == {2}, "a tenth of the rows before what it never solves"
    assert Counter(kinds[12:100]) == {1: 20, 2: 28, 3: 40}
    assert 3 in kinds[12:40], "which then comes soon"
    assert arrange([*easy, *middle, *hopeless], TRAINING) == ordered
    assert arrange([*easy, *middle, *hopeless], replace(TRAINING, seed=1)) != ordered


def test_without_differences_it_is_the_plain_order() -> None:
    rows = rows_at(0.0, 30, 300)
    assert sorted(list(row.input_ids) for row in arrange(rows, replace(TRAINING, epochs=1))) == sorted(
        list(row.input_ids) for row in order_rows([row for row, _ in rows], 4, epochs=1, seed=0)
    )


def test_an_untried_row_takes_the_mean_of_those_tried_around_its_length() -> None:
    def row(length: int) -> Row:
        return Row([1] * length, 1)

    tried = [(row(10), 1.0), (row(12), 0.5), (row(30), 0.25), (row(32), 0.0)]
    untried = [(row(length), None) for length in (2, 11, 31, 90)]
    assert [rate for _, rate in estimated([*untried, *tried], nearest=2)] == [0.75, 0.75, 0.125, 0.125, 1, 0.5, 0.25, 0]
    assert [rate for _, rate in estimated([*untried, *tried])][:4] == [0.4375] * 4  # fewer tried than wanted
    assert estimated(untried) == untried
