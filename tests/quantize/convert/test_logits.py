"""Logits of llama.cpp against transformers running the very numbers that the file holds, by type and architecture."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from deepdistill.quantize.convert.ftypes import FTYPES

ROOT = Path(__file__).resolve().parents[3]
ARCHITECTURES = ["llama", "qwen2", "qwen3", "qwen3moe", "gemma3", "deepseek2", "deepseek3", "pocket"]


@pytest.fixture(scope="module")
def checker() -> ModuleType:
    """The benchmark, which also checks what is too long for here."""
    spec = importlib.util.spec_from_file_location("check_logits", ROOT / "benchmarks" / "check_logits.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compare(checker: ModuleType, make: Callable[..., Path], tmp_path: Path, arch: str, types: list[str]) -> None:
    folder = ROOT / "distill" / "pocket" / "weights"
    if arch != "pocket":
        folder = make(arch, dtype="float16", **checker.MODELS[arch])
    found = checker.check(folder, types, tmp_path)
    assert list(found) == types
    for ftype, one in found.items():
        assert one["median"] < checker.LIMITS[ftype], ftype
    if "F32" in types and arch != "gemma3":
        assert found["F32"]["worst"] < 1e-4
    if "F16" in types:
        assert found["F16"]["worst"] < 0.02
        assert found["F16"]["median_logit"] < 0.01


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_file_computes_what_its_numbers_do(
    checker: ModuleType, make_checkpoint: Callable[..., Path], tmp_path: Path, arch: str
) -> None:
    compare(checker, make_checkpoint, tmp_path, arch, ["F16", "Q4_K_M"] if arch == "pocket" else ["F32", "Q4_K_M"])


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_type_computes_what_its_numbers_do(
    checker: ModuleType, make_checkpoint: Callable[..., Path], tmp_path: Path, arch: str
) -> None:
    compare(checker, make_checkpoint, tmp_path, arch, list(FTYPES))


def test_numbers_in_the_wrong_place_are_noticed(
    checker: ModuleType, make_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keep the tests above honest: without llama's permutation the logits are far off."""
    from deepdistill.quantize.convert.architectures import llama

    monkeypatch.setattr(llama, "permute", lambda rows, _n_heads: rows)
    folder = make_checkpoint("llama", dtype="float16", **checker.MODELS["llama"])
    assert checker.check(folder, ["F32"], tmp_path)["F32"]["median"] > 0.05
