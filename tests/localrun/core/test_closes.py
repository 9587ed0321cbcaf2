"""What closes is closed at the end of its block, whatever ends it."""

from __future__ import annotations

import pytest

from deepdistill.localrun.core.closes import Closes


class Resource(Closes):
    def __init__(self) -> None:
        self.n_closed = 0

    def close(self) -> None:
        self.n_closed += 1


def test_the_end_of_a_block_closes() -> None:
    with Resource() as resource:
        assert resource.n_closed == 0
    assert resource.n_closed == 1


def test_an_error_closes_and_goes_through() -> None:
    resource = Resource()
    with pytest.raises(ValueError, match="inside"), resource:
        raise ValueError("inside")
    assert resource.n_closed == 1
