"""A student to a file that was chosen, measured, held to a gate and can be made again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from deepdistill.cli import main
from deepdistill.errors import ArtifactError, GateError, UsageError
from deepdistill.localrun.gguf.header import read_gguf
from deepdistill.localrun.weights.swap import LogitReader
from deepdistill.quantize.measure.fidelity import Reference
from deepdistill.quantize.measure.paired import Answers
from deepdistill.quantize.measure.texts import read_texts
from deepdistill.quantize.provenance.comparison import update_report
from deepdistill.quantize.provenance.inspect import inspect_gguf, own_metadata, summary
from deepdistill.quantize.recipe import CalibrationRecipe, HealRecipe, QuantizeRecipe
from deepdistill.quantize.release import DistillStage, Release, release
from deepdistill.quantize.verify import verify


@pytest.fixture
def settings(traces: Path, small: CalibrationRecipe) -> QuantizeRecipe:
    return QuantizeRecipe(traces=traces, calibration=small)


@pytest.fixture(scope="module")
def budgeted(
    tied: Path, traces: Path, tmp_path_factory: pytest.TempPathFactory, small: CalibrationRecipe
) -> tuple[Path, Release]:
    """A file of at most 5.5 bits a weight, with a recipe beside it in the table."""
    path = tmp_path_factory.mktemp("budget") / "small.gguf"
    wanted = QuantizeRecipe(bpw=5.5, traces=traces, calibration=small, compare=("Q4_0",))
    recipe = {"teacher": "pocket", "problems": "gym:chain_sum?seed=1"}
    return path, release(tied, path, settings=wanted, stage=DistillStage(recipe), n_threads=1)


def answers(n_right: int) -> Answers:
    return Answers((True,) * n_right + (False,) * (20 - n_right), 1.0, 0.0)


def test_a_file_of_chosen_types_keeps_its_budget_and_knows_itself(budgeted: tuple[Path, Release]) -> None:
    path, made = budgeted
    header = read_gguf(path)
    n_bytes = sum(tensor.n_bytes for tensor in header.tensors.values())
    assert 5.2 < 8 * n_bytes / made.report.n_weights <= 5.5
    assert made.report.bits_per_weight == pytest.approx(8 * n_bytes / made.report.n_weights)
    assert len({tensor.type for tensor in header.tensors.values()} - {Type.F32}) > 1
    chosen = {name: kind for row in made.choices for name, kind in [(row["tensor"], row["type"])]}
    assert header.tensors["blk.0.attn_q.weight"].type.name == chosen["blk.0.attn_q.weight"]
    own = own_metadata(path)
    assert own["teacher"] == "pocket"
    assert own["base_model"] == "some-org/Some-Base-1B"
    assert [(one["what"], one["licence"]) for one in own["licences"]] == [
        ("model", "apache-2.0"),
        ("base model", "apache-2.0"),
        ("teacher", "mit"),
        ("problems", "apache-2.0"),
    ]
    assert own["imatrix"]["tokens"] > 500
    assert made.fidelity is not None
    assert own["measured"]["fidelity"]["kl_mean"] == pytest.approx(made.fidelity.kl_mean, rel=1e-4)
    assert own["measured"]["memory_bytes"] > path.stat().st_size
    lines = "\n".join(summary(inspect_gguf(path)))
    assert "licence: apache-2.0" in lines
    assert f"KL {made.fidelity.kl_mean:.4f}" in lines


def test_measured_is_what_llama_cpp_says_of_the_file(
    budgeted: tuple[Path, Release], f16: Path, traces: Path, small: CalibrationRecipe
) -> None:
    path, made = budgeted
    texts = read_texts(traces, f16, small).measure
    with LogitReader(f16, n_threads=1) as plain, LogitReader(path, n_threads=1) as reader:
        found = Reference.of(plain, texts).measure(reader)
    assert made.fidelity is not None
    assert found.kl_mean == pytest.approx(made.fidelity.kl_mean, rel=0.02)


def test_card_and_table_hold_ours_and_the_recipes(budgeted: tuple[Path, Release]) -> None:
    path, made = budgeted
    card = path.with_name("README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\nbase_model:\n- some-org/Some-Base-1B\n")
    assert made.fidelity is not None
    row = next(line for line in card.splitlines() if line.startswith("| small.gguf |"))
    assert f"| {made.fidelity.kl_mean:.4f} |" in row
    assert "| Q4_0 |" in card
    svg = path.with_name("fidelity.svg").read_text()
    assert svg.count("<circle") == 1
    assert svg.count("<rect") == 1


def test_the_runs_report_shows_the_files(budgeted: tuple[Path, Release], tmp_path: Path) -> None:
    _, made = budgeted
    report = tmp_path / "report.html"
    report.write_text("<main>a<!-- files: begin --><!-- files: end -->z</main>")
    for _ in range(2):
        update_report(tmp_path, made.rows)
    page = report.read_text()
    assert page.startswith("<main>a<!-- files: begin -->")
    assert page.endswith("<!-- files: end -->z</main>")
    assert page.count("<td>small.gguf</td>") == page.count("<svg") == 1


def test_a_card_of_somebody_else_is_left_alone(tied: Path, settings: QuantizeRecipe, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    release(tied, tmp_path / "a.gguf", settings=replace(settings, fidelity=False), n_threads=1)
    assert (tmp_path / "README.md").read_text() == "mine"
    assert "# " in (tmp_path / "a.gguf.md").read_text()


def test_a_size_is_kept_to_the_byte(tied: Path, settings: QuantizeRecipe, tmp_path: Path) -> None:
    wanted = replace(settings, size=150_000)
    made = release(tied, tmp_path / "a.gguf", settings=wanted, n_threads=1)
    assert 140_000 < (tmp_path / "a.gguf").stat().st_size == made.report.n_bytes <= 150_000
    with pytest.raises(UsageError, check=lambda error: error.code == "budget-too-small"):
        release(tied, tmp_path / "b.gguf", settings=replace(settings, size=50_000), n_threads=1)
    assert not (tmp_path / "b.gguf").exists()


def test_a_file_is_made_again_and_a_changed_one_is_found_out(
    budgeted: tuple[Path, Release], tied: Path, tmp_path: Path
) -> None:
    path, _ = budgeted
    assert verify(path).holds
    assert main(["quantize", "--verify", str(path), "--quiet"]) == 0
    tampered = shutil.copy(path, path.with_name("tampered.gguf"))
    tensor = read_gguf(path).tensors["blk.1.ffn_down.weight"]
    with tampered.open("r+b") as file:
        file.seek(tensor.offset + 7)
        byte = file.read(1)
        file.seek(tensor.offset + 7)
        file.write(bytes([byte[0] ^ 1]))
    found = verify(tampered)
    assert found.different == ("blk.1.ffn_down.weight",)
    assert main(["quantize", "--verify", str(tampered), "--quiet"]) == 3
    other = Path(shutil.copytree(tied, tmp_path / "other"))
    (other / "generation_config.json").write_text("{}")
    found = verify(path, other)
    assert [str(other / "generation_config.json") in text for text in found.sources] == [True]


def test_no_file_has_the_name_if_the_gate_is_not_met(tied: Path, settings: QuantizeRecipe, tmp_path: Path) -> None:
    out = tmp_path / "a.gguf"
    out.write_text("before")
    wanted = replace(settings, type="Q4_0", gate="accuracy >= 0.9 of bf16, kl <= 10")
    given = iter([answers(20), answers(10)])
    with pytest.raises(GateError, check=lambda error: error.code == "gate-not-met" and "accuracy" in error.message):
        release(tied, out, settings=wanted, stage=DistillStage(evaluate=lambda _: next(given)), n_threads=1)
    assert out.read_text() == "before"
    assert [one.name for one in tmp_path.iterdir() if one.suffix == ".gguf" and "imatrix" not in one.name] == ["a.gguf"]
    given = iter([answers(20), answers(18)])
    made = release(tied, out, settings=wanted, stage=DistillStage(evaluate=lambda _: next(given)), n_threads=1)
    assert made.paired is not None
    assert (made.paired.lost, made.paired.gained) == (2, 0)
    assert own_metadata(out)["measured"]["answers"]["accuracy"] == 0.9
    with pytest.raises(UsageError, check=lambda error: error.code == "no-problems"):
        release(tied, out, settings=wanted, n_threads=1)


def test_tensors_are_raised_until_the_gate_is_met(tied: Path, settings: QuantizeRecipe, tmp_path: Path) -> None:
    plain = release(tied, tmp_path / "a.gguf", settings=replace(settings, type="Q4_0"), n_threads=1)
    assert plain.fidelity is not None
    limit = plain.fidelity.kl_mean / 3
    wanted = replace(settings, type="Q4_0", gate=f"kl <= {limit:.6f}", promote=True)
    made = release(tied, tmp_path / "b.gguf", settings=wanted, n_threads=1)
    assert made.fidelity is not None
    assert made.n_promotions > 0
    assert made.fidelity.kl_mean <= limit
    assert made.report.n_bytes > plain.report.n_bytes
    assert not (tmp_path / "c.gguf").exists()
    limited = replace(settings, size=2 * made.report.n_bytes, gate=f"kl <= {limit:.6f}", promote=True)
    lean = release(tied, tmp_path / "d.gguf", settings=limited, n_threads=1)
    assert lean.report.n_bytes < 2 * made.report.n_bytes
    never = replace(settings, type="Q4_0", gate=f"bytes <= 1000, kl <= {limit:.6f}", promote=True)
    with pytest.raises(GateError, check=lambda error: error.code == "gate-not-met" and "bytes" in error.message):
        release(tied, tmp_path / "c.gguf", settings=never, n_threads=1)


def test_an_imatrix_may_be_given_or_left_out(tied: Path, settings: QuantizeRecipe, tmp_path: Path) -> None:
    first = release(tied, tmp_path / "made.gguf", settings=replace(settings, type="Q4_0"), n_threads=1)
    (matrix,) = tmp_path.glob(f"{tied.name}-*.imatrix.gguf")
    given = replace(settings, type="Q4_0", imatrix=str(matrix), traces=None, fidelity=False)
    release(tied, tmp_path / "given.gguf", settings=given, n_threads=1)
    none = replace(settings, type="Q4_0", imatrix="none")
    release(tied, tmp_path / "none.gguf", settings=none, n_threads=1)
    stored = {name: blocks(tmp_path / f"{name}.gguf", "blk.0.ffn_up.weight") for name in ("made", "given", "none")}
    assert (stored["made"] == stored["given"]).all()
    assert (stored["made"] != stored["none"]).any()
    assert first.fidelity is not None
    assert "imatrix" not in own_metadata(tmp_path / "none.gguf")


def blocks(path: Path, name: str) -> Any:
    tensor = read_gguf(path).tensors[name]
    return np.fromfile(path, np.uint8, tensor.n_bytes, offset=tensor.offset)


def test_a_file_in_parts_is_measured_and_made_again(tied: Path, settings: QuantizeRecipe, tmp_path: Path) -> None:
    made = release(tied, tmp_path / "a.gguf", settings=replace(settings, type="Q4_0", split=60_000), n_threads=1)
    first = made.report.path
    assert first.name.startswith("a-00001-of-0000")
    assert made.report.n_bytes == sum(path.stat().st_size for path in tmp_path.glob("a-*.gguf")) > 100_000
    assert made.fidelity is not None
    assert verify(first).holds
    found = inspect_gguf(first)
    assert (found["bytes"], found["weights"]) == (made.report.n_bytes, made.report.n_weights)
    last = max(tmp_path.glob("a-*.gguf"))
    last.unlink()
    with pytest.raises(ArtifactError, check=lambda error: last.name in error.message):
        verify(first)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["qwen2", "qwen3", "qwen3moe", "gemma3", "deepseek2", "deepseek3"])
def test_every_architecture_gets_chosen_types(
    make_checkpoint: Callable[..., Path], traces: Path, tmp_path: Path, arch: str, small: CalibrationRecipe
) -> None:
    folder = make_checkpoint(arch)
    wanted = QuantizeRecipe(bpw=7, traces=traces, calibration=small)
    made = release(folder, tmp_path / "a.gguf", settings=wanted, n_threads=1)
    assert made.report.bits_per_weight <= 7
    assert made.fidelity is not None
    plain = release(folder, tmp_path / "b.gguf", settings=replace(wanted, bpw=None, type="Q4_0"), n_threads=1)
    assert plain.fidelity is not None
    assert made.fidelity.kl_mean < plain.fidelity.kl_mean
    assert verify(tmp_path / "a.gguf").holds
    matrices = {name for name, shape in shapes_of(tmp_path / "a.gguf").items() if len(shape) > 1}
    seen = shapes_of(next(tmp_path.glob(f"{folder.name}-*.imatrix.gguf")))
    missing = {name for name in matrices if f"{name}.in_sum2" not in seen}
    assert missing <= {"token_embd.weight"}, "only a table of lookups is multiplied with nothing"


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["qwen2", "qwen3", "qwen3moe", "gemma3", "deepseek3"])
def test_every_architecture_can_be_healed(
    make_checkpoint: Callable[..., Path], traces: Path, tmp_path: Path, arch: str, small: CalibrationRecipe
) -> None:
    projected_kl = pytest.importorskip("deepdistill.distill.training.losses").projected_kl
    wanted = QuantizeRecipe(type="Q4_0", traces=traces, calibration=small)
    folder = make_checkpoint(arch)
    plain = release(folder, tmp_path / "plain.gguf", settings=wanted, n_threads=1)
    healed = release(
        folder,
        tmp_path / "healed.gguf",
        settings=replace(wanted, heal=HealRecipe(15)),
        stage=DistillStage(divergence=projected_kl),
        n_threads=1,
    )
    assert plain.fidelity is not None
    assert healed.fidelity is not None
    assert healed.fidelity.kl_mean < 0.8 * plain.fidelity.kl_mean
    assert verify(tmp_path / "healed.gguf").holds


def shapes_of(path: Path) -> dict[str, tuple[int, ...]]:
    return {name: tensor.shape for name, tensor in read_gguf(path).tensors.items()}


def test_a_recipe_goes_without_traces_where_they_are_too_few(tied: Path, traces: Path, tmp_path: Path) -> None:
    few = tmp_path / "few.jsonl"
    few.write_text("".join(traces.read_text().splitlines(keepends=True)[:3]))
    made = release(tied, tmp_path / "a.gguf", settings=QuantizeRecipe(type="Q4_0", traces=few), n_threads=1)
    assert made.fidelity is None
    assert any("too few verified traces" in note for note in made.report.notes)
    with pytest.raises(UsageError, check=lambda error: error.code == "too-few-traces"):
        release(tied, tmp_path / "b.gguf", settings=QuantizeRecipe(bpw=5, traces=few), n_threads=1)


def test_settings_that_contradict_are_refused(tied: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.gguf"
    with pytest.raises(UsageError, check=lambda error: error.code == "settings-conflict"):
        release(tied, out, settings=QuantizeRecipe(size=10**6, bpw=4))
    with pytest.raises(UsageError, check=lambda error: error.code == "gate-missing"):
        release(tied, out, settings=QuantizeRecipe(promote=True))
    with pytest.raises(UsageError, check=lambda error: error.code == "no-traces"):
        release(tied, out, settings=QuantizeRecipe(bpw=5), n_threads=1)


def test_on_the_command_line(
    tied: Path,
    traces: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("deepdistill.quantize.release.default_threads", lambda: 1)
    out = tmp_path / "a.gguf"
    command = ["quantize", str(tied), "--out", str(out), "--traces", str(traces), "--no-proofs", "--quiet", "--json"]
    assert main([*command, "--type", "Q4_0", "--gate", "kl <= 0.0000001"]) == 3
    assert not out.exists()
    assert "the gate was not met: kl is" in capsys.readouterr().err
    assert main([*command, "--type", "Q4_0"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["fidelity"]["kl_mean"] > 0
    assert report["n_bytes"] == out.stat().st_size
    assert main(["inspect", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["deepdistill"]["quantization"]["type"] == "Q4_0"


def test_types_that_need_an_importance_matrix_can_be_had_with_one(tied: Path, traces: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.gguf"
    command = ["quantize", str(tied), "--type", "iq3_xxs", "--out", str(out), "--no-proofs", "--quiet"]
    assert main([*command, "--traces", str(traces)]) == 0
    assert Type.IQ3_XXS in {tensor.type for tensor in read_gguf(out).tensors.values()}
    out.unlink()
    for missing in (["--imatrix", "none"], []):
        assert main([*command, *missing]) == 2
    assert not out.exists()


def test_what_cannot_be_done_is_said_before_anything_is(
    tied: Path, traces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*more: str) -> str:
        code = main(["quantize", str(tied), "--traces", str(traces), "--quiet", *more])
        assert code == 2
        return capsys.readouterr().err

    out = ["--out", str(tmp_path / "a.gguf")]
    assert "no type 'Q4_KM'" in refused(*out, "--compare", "Q4_0, Q4_KM")
    assert "--promote makes others" in refused(*out, "--heal", "3", "--promote", "--gate", "kl <= 1")
    assert "no problems to ask" in refused(*out, "--n", "20")
    assert "no problems to ask" in refused(*out, "--gate", "accuracy >= 0.9 of bf16")
    assert "does not end in .gguf" in refused("--out", str(tmp_path / "model"))
    assert list(tmp_path.iterdir()) == []
    assert main(["quantize", str(tied), "--out", str(tmp_path), "--no-proofs", "--quiet"]) == 0
    assert [path.name for path in tmp_path.glob("*.gguf")] == [f"{tied.name}-Q8_0.gguf"], "by its own name"
    with pytest.raises(UsageError, check=lambda error: error.code == "is-folder"):
        release(tied, tmp_path, settings=QuantizeRecipe(), n_threads=1)


def test_bytes_are_a_share_of_the_unquantized_ones_though_nothing_is_measured(tied: Path, tmp_path: Path) -> None:
    wanted = QuantizeRecipe(type="Q8_0", fidelity=False, gate="bytes <= 0.9 of bf16")
    assert release(tied, tmp_path / "a.gguf", settings=wanted, n_threads=1).report.path.exists()


def test_too_few_traces_hinder_only_what_reads_them(tied: Path, traces: Path, tmp_path: Path) -> None:
    few = tmp_path / "traces.jsonl"
    few.write_text("".join(f"{line}\n" for line in traces.read_text().splitlines()[:2]))
    wanted = QuantizeRecipe(type="Q4_0", traces=few, imatrix="none", fidelity=False)
    assert release(tied, tmp_path / "a.gguf", settings=wanted, n_threads=1).report.path.exists()
    with pytest.raises(UsageError, check=lambda error: error.code == "needs-imatrix"):
        release(tied, tmp_path / "b.gguf", settings=QuantizeRecipe(type="IQ2_S", traces=few), n_threads=1)
