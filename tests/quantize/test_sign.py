"""What a file says about itself before it is written."""

from __future__ import annotations

import pytest

from deepdistill.quantize.measure.texts import Text
from deepdistill.quantize.provenance.metadata import MEASURED
from deepdistill.quantize.sign import as_metadata, think_budget


@pytest.mark.parametrize(("lengths", "budget"), [([0], 32), ([64], 96), ([65], 128), ([10] * 99 + [9999], 32)])
def test_the_budget_of_thinking_leaves_outliers_out(lengths: list[int], budget: int) -> None:
    assert think_budget([Text((1, 2), 1, n) for n in lengths]) == budget


def test_metadata_is_text_or_json_with_space_for_measurements() -> None:
    found = as_metadata({"teacher": "pocket", "tools": {"gguf": "0.19"}})
    assert found["deepdistill.teacher"] == "pocket"
    assert found["deepdistill.tools"] == '{"gguf": "0.19"}'
    assert str(found[MEASURED]).strip() == "{}"
    assert len(str(found[MEASURED])) > 1000
