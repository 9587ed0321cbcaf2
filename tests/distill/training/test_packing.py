"""What packing lays out: every row whole, nothing twice."""

from __future__ import annotations

import random

import numpy as np
import torch

from deepdistill.distill.training.packing import pack, pad, rounded_up
from deepdistill.distill.training.rows import Row
from deepdistill.localrun.core.generation import TopLogprobs

ROWS = [Row([5, 6, 7, 8], 2), Row([5, 6, 9], 2), Row([4, 1, 2], 1), Row([5, 6, 7, 8], 3)]


def _rows_of(batch: object) -> list[list[int]]:
    """Read the rows back through gather, without their padding (lengths from scatter are not needed: ids differ)."""
    layout = batch.layout  # type: ignore[attr-defined]
    return batch.input_ids[0][layout.gather].tolist()  # type: ignore[attr-defined, no-any-return]


def test_packed_rows_are_whole_and_what_they_share_stands_once() -> None:
    batch = pack(ROWS)
    assert batch.input_ids.tolist() == [[4, 1, 2, 5, 6, 7, 8, 9, *[0] * 8]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 3, 2, *[0] * 8]]
    assert [
        row[: len(given)] for row, given in zip(_rows_of(batch), sorted(list(r.input_ids) for r in ROWS), strict=True)
    ] == (sorted(list(r.input_ids) for r in ROWS))
    assert batch.n_tokens == 14
    assert batch.targets.ids.tolist() == [1, 2, 7, 8, 8, 9]
    assert batch.positions.tolist() == [0, 1, 4, 5, 5, 4]  # of two targets behind the same token each has its own


def test_scatter_brings_every_token_back_from_where_gather_put_it() -> None:
    rng = random.Random(1)
    rows = [Row([rng.randrange(3) for _ in range(rng.randrange(2, 9))], 1) for _ in range(40)]
    batch = pack(rows)
    assert batch.layout is not None
    flat = batch.layout.gather.flatten()
    assert torch.equal(flat[batch.layout.scatter], torch.arange(batch.input_ids.shape[1]))
    assert batch.input_ids.shape[1] < 0.6 * batch.n_tokens
    following = {(int(p), int(t)) for p, t in zip(batch.positions, batch.targets.ids, strict=True)}
    tokens = batch.input_ids[0].tolist()
    for row in rows:  # walk each row along the flat tokens: its targets must be predicted where it passes
        assert {tokens[p] for p, _ in following} >= set(row.input_ids[:-1])
    assert len(batch.targets) == sum(row.n_targets for row in rows)


def test_sizes_come_in_few_steps_and_what_fills_them_stands_behind_a_row() -> None:
    rng = random.Random(2)
    shapes = set()
    for n in range(200):
        rows = [Row([rng.randrange(1, 9) for _ in range(rng.randrange(2, 90))], 1) for _ in range(1 + n % 5)]
        batch = pack(rows)
        assert batch.layout is not None
        shapes.add((batch.input_ids.shape[1], *batch.layout.gather.shape))
        assert batch.input_ids.shape[1] % 16 == batch.layout.gather.shape[1] % 16 == 0
        ends = {row[: len(row)].index(0) for row in _rows_of(batch) if 0 in row}  # no row holds a 0 but as filling
        assert ends <= {len(row.input_ids) for row in rows}
        assert len(batch.layout.scatter) == len(set(batch.layout.scatter.tolist())) == batch.input_ids.shape[1]
    assert len(shapes) < 120
    sizes = [rounded_up(n) for n in range(1, 100_000)]
    assert all(n <= size <= max(n + 15, 1.065 * n) for n, size in enumerate(sizes, 1))
    assert len(set(sizes)) < 200


def test_padded_rows_have_the_same_targets() -> None:
    batch = pad(ROWS, pad_token_id=0)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8], [5, 6, 9, 0], [4, 1, 2, 0], [5, 6, 7, 8]]
    assert batch.targets.ids.tolist() == [7, 8, 9, 1, 2, 8]
    assert batch.positions.tolist() == [1, 2, 5, 8, 9, 14]
    assert batch.layout is None


def test_each_row_keeps_its_losses_weights_and_log_probabilities() -> None:
    kl = (("cross_entropy", 0.5), ("forward_kl", 0.5))
    top = TopLogprobs(np.array([[3, 1], [2, -1]], np.int32), np.array([[-0.1, -3.0], [-0.2, -9.0]], np.float32))
    rows = [
        Row([1, 2, 3], 1, losses=kl, top=top, weights=[0.5, 2.0]),
        Row([4, 5], 1),
        Row([1, 2], 1, losses=(("policy_gradient", 1.0),), advantages=[-2.0]),
        Row([1, 4], 1),
    ]
    batch = pack(rows)
    names = [(segment.end - segment.start, segment.losses[0][0]) for segment in batch.segments]
    assert names == [(2, "cross_entropy"), (2, "cross_entropy"), (1, "policy_gradient")]
    assert batch.segments[0].losses == kl
    assert batch.targets.ids.tolist() == [2, 3, 4, 5, 2]
    assert batch.targets.weights.tolist() == [0.5, 2, 1, 1, 1]
    assert batch.weight == 5.5
    assert batch.targets.advantages is not None
    assert batch.targets.top_ids is not None
    assert batch.targets.advantages.tolist() == [0, 0, 0, 0, -2]
    assert batch.targets.top_ids.tolist() == [[3, 1], [2, -1], [-1, -1], [-1, -1], [-1, -1]]
    assert batch.targets.old_logprobs is None
