"""What a round teaches, sample by sample."""

from __future__ import annotations

from deepdistill.distill.training.on_policy.dataset import negative_row
from deepdistill.localrun.core.loops import Loop


def test_only_what_repeats_is_a_negative() -> None:
    row = negative_row([1, 2, 3], [4, 5, *[7, 8] * 100], Loop(2, 2))
    assert row.losses == (("unlikelihood", 1.0),)
    assert list(row.input_ids[:9]) == [1, 2, 3, 4, 5, 7, 8, 7, 8]
    assert row.weights is not None
    assert row.weights[:6] == [0, 0, 0, 0, 1, 1]
    assert sum(row.weights) == 64  # its beginning is enough
    assert len(row.weights) == row.n_targets
