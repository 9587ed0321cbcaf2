"""What each type does to each tensor: measured against torch, and put together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from gguf import GGMLQuantizationType as Type

from deepdistill.localrun.gguf import ggml
from deepdistill.localrun.gguf.ggml import dequantize_rows
from deepdistill.quantize.choose.allocate import Choice, Item, promoted, solve
from deepdistill.quantize.choose.sensitivity import Sensitivity, refine
from deepdistill.quantize.choose.workbench import Workbench
from deepdistill.quantize.measure.fidelity import Reference
from deepdistill.quantize.recipe import CalibrationRecipe, QuantizeRecipe


def test_a_measured_damage_is_that_of_the_changed_weights(
    tied: Path, traces: Path, tmp_path: Path, small: CalibrationRecipe
) -> None:
    torch = pytest.importorskip("torch")
    AutoModelForCausalLM = pytest.importorskip("transformers").AutoModelForCausalLM
    settings = QuantizeRecipe(type="Q4_0", traces=traces, calibration=small)
    bench = Workbench(tied, tmp_path, tmp_path, settings, n_threads=1)
    item = next(item for item in bench.sensitivity.items if item.name == "blk.1.ffn_down.weight")
    choice = next(one for one in item.choices if one.type in (Type.Q3_K, Type.IQ3_S, Type.Q2_K))
    with bench.open_meter() as meter:
        measured, again = (meter.damage({item.name: choice.type}) for _ in range(2))
        assert measured == again, "the tensor was put back"
    model: Any = AutoModelForCausalLM.from_pretrained(tied, dtype=torch.float32)
    weight = model.model.layers[1].mlp.down_proj.weight
    type_, plain = choice.type, weight.detach().numpy().copy()

    class Torch:
        def logit_rows(self, tokens: Any, start: int = 1) -> Any:
            with torch.no_grad():
                yield from model(torch.tensor([list(tokens)])).logits[0, start - 1 : -1].numpy()

    reference = Reference.of(Torch(), bench.texts.choose)
    data = ggml.quantize_rows(plain, type_, imatrix=bench.importance[item.name])
    weight.data = torch.from_numpy(dequantize_rows(data, type_, plain.shape[1]))
    assert measured == pytest.approx(reference.measure(Torch()).kl_mean, rel=0.1)


def item_of(name: str, *errors: float) -> Item:
    sizes = {Type.Q4_0: 2, Type.Q4_1: 3, Type.Q8_0: 6}
    return Item(name, tuple(Choice(t, n, e) for (t, n), e in zip(sizes.items(), errors, strict=False)))


def test_damage_is_error_at_the_tensors_cost_and_the_types_level(tmp_path: Path) -> None:
    items = [item_of(f"blk.{layer}.ffn_up.weight", 4.0, 1.0) for layer in range(3)] + [item_of("x.weight", 1.0)]
    costs = {"blk.0.ffn_up.weight": 0.01, "blk.2.ffn_up.weight": 0.04}
    known = Sensitivity(items, "key", tmp_path / "s.json", costs, {"Q4_1": 3.0})
    damages = [[choice.damage for choice in item.choices] for item in known.weighed()]
    assert damages[0] == pytest.approx([0.04, 0.03])
    assert damages[1] == pytest.approx([0.08, 0.06]), "between two layers, on a logarithmic scale"
    assert damages[2] == pytest.approx([0.16, 0.12])
    assert damages[3] == pytest.approx([0.02]), "without a relative, the average"
    known.save()
    again = Sensitivity.open(tmp_path / "s.json", "key", list)
    assert again.weighed() == known.weighed()
    assert Sensitivity.open(tmp_path / "s.json", "another", list).items == []


def test_errors_that_point_the_same_way_are_seen_only_together(tmp_path: Path) -> None:
    """Q4_1 errs least on each tensor, and its errors add up as amplitudes do; Q4_0's are independent."""
    items = [item_of(f"blk.{layer}.ffn_up.weight", 4.0, 1.0, 0.01) for layer in range(20)]
    asked = []

    def damage(changes: Mapping[str, Type]) -> float:
        asked.append(dict(changes))
        kinds = list(changes.values())
        one_by_one = {Type.Q4_0: 4e-4, Type.Q4_1: 1e-4, Type.Q8_0: 1e-6}
        apart = sum(one_by_one[kind] for kind in kinds if kind != Type.Q4_1)
        return apart + (kinds.count(Type.Q4_1) ** 2) * one_by_one[Type.Q4_1]

    known = Sensitivity(items, "key", tmp_path / "s.json")
    chosen = refine(known, damage, choose=lambda items: solve(items, 60))
    assert known.levels["Q4_1"] == pytest.approx(20)
    assert Type.Q4_1 not in {choice.type for choice in chosen}
    assert sum(choice.n_bytes for choice in chosen) <= 60
    n = len(asked)
    refine(known, damage, choose=lambda items: solve(items, 70))
    assert len(asked) == n, "another budget measures nothing twice"
    fresh = Sensitivity(items, "key", tmp_path / "t.json")
    raised = refine(
        fresh,
        damage,
        choose=lambda items: promoted(items, [item.of(Type.Q4_0) for item in items], n_more=20, most=99),
    )
    assert Counter(choice.type for choice in raised) == {Type.Q4_0: 15, Type.Q8_0: 5}, "nor is anything raised to Q4_1"
