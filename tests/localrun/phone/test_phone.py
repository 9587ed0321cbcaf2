"""The folder for phones: which file goes in, what it says, and what Ollama makes of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import jinja2
import numpy as np
import pytest

from deepdistill.errors import ArtifactError, ModelError
from deepdistill.localrun.phone import phone
from deepdistill.localrun.phone.cards import ModelCard, modelfile
from deepdistill.localrun.phone.phone import choose_model, export_phone

PLENTY = 2_000_000_000


def unpack_nothing(folder: Path, **_: object) -> list[str]:
    """Stand in for wllama, which is fetched."""
    for name in ("index.min.js", "wllama.wasm", "compat.js", "compat.wasm", "LICENCE"):
        (folder / name).write_text(name)
    return ["fetched"]


@pytest.fixture
def no_wllama(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the network out."""
    monkeypatch.setattr(phone, "unpack_wllama", unpack_nothing)


def quantized(path: Path, source: Path) -> Path:
    """Write a tiny model's matrices as Q8_0, with a licence and an origin."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(path, "llama")
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            kinds = [*field.types, None]
            writer.add_key_value(field.name, field.contents(), kinds[0], kinds[1])
    writer.add_license("apache-2.0")
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, "Base-1M")
    writer.add_base_model_repo_url(0, "https://example.com/base")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    for tensor in reader.tensors:
        type_ = gguf.GGMLQuantizationType.Q8_0 if len(tensor.shape) > 1 else gguf.GGMLQuantizationType.F32
        data = gguf.quants.quantize(np.array(tensor.data), type_)
        writer.add_tensor(tensor.name, data, raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def q8_gguf(random_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random model in Q8_0."""
    return quantized(tmp_path_factory.mktemp("q8") / "tiny model-Q8_0.gguf", random_gguf)


def exported(web: Path) -> dict[str, Any]:
    """Return what files.js tells the page."""
    text = (web / "files.js").read_text()
    return dict(json.loads(text.removeprefix("self.EXPORT = ").rstrip().removesuffix(";")))


@pytest.mark.usefixtures("no_wllama")
def test_the_folder_is_whole_and_the_page_knows_its_files(q8_gguf: Path, tmp_path: Path) -> None:
    report = export_phone(q8_gguf, tmp_path / "out")
    web = tmp_path / "out" / "web"
    facts = exported(web)
    on_disk = {p.relative_to(web).as_posix(): p.stat().st_size for p in web.rglob("*") if p.is_file()}
    assert facts["files"] | {"files.js": on_disk["files.js"], "wllama/LICENCE": 7} == on_disk
    assert set(facts["shards"]) < set(on_disk)
    assert set(facts["shell"]) - {"./"} < set(on_disk)
    kept = {*facts["shell"], *facts["shards"], "wllama/wllama.wasm", "wllama/compat.wasm", "wllama/compat.js"}
    assert set(facts["files"]) <= kept, "a file that no visit would keep is missing offline"
    assert facts["tags"] == {"open": "<think>", "close": "</think>"}
    assert facts["startsInside"] is True
    assert facts["nCtx"] == 512
    assert report.files["tiny-model-Q8_0.gguf"] == q8_gguf.stat().st_size
    assert (tmp_path / "out" / "tiny-model-Q8_0.gguf").read_bytes() == q8_gguf.read_bytes()
    assert report.notes == ("fetched",)
    card = (tmp_path / "out" / "README.md").read_text()
    for said in ("apache-2.0", "[Base-1M](https://example.com/base)", "Q8_0", "tiny-model-Q8_0.gguf", "Termux"):
        assert said in card
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.usefixtures("no_wllama")
def test_another_model_is_another_version(q8_gguf: Path, random_gguf: Path, tmp_path: Path) -> None:
    for name, path in (("a", q8_gguf), ("b", q8_gguf), ("c", random_gguf)):
        export_phone(path, tmp_path / name)
    versions = [exported(tmp_path / name / "web")["version"] for name in "abc"]
    assert versions[0] == versions[1] != versions[2]


@pytest.mark.usefixtures("no_wllama")
def test_nothing_is_overwritten_and_nothing_half_written_stays(q8_gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(ArtifactError, check=lambda error: error.code == "already-exists"):
        export_phone(q8_gguf, tmp_path / "out")
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(q8_gguf.read_bytes()[:-100])
    with pytest.raises(ArtifactError, check=lambda error: error.code == "gguf-cut-short"):
        export_phone(broken, tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.gguf", "out"]


def test_a_failed_fetch_leaves_nothing(q8_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(folder: Path, **_: object) -> list[str]:
        raise ModelError("no network", code="registry-unreachable")

    monkeypatch.setattr(phone, "unpack_wllama", fail)
    with pytest.raises(ModelError, check=lambda error: error.code == "registry-unreachable"):
        export_phone(q8_gguf, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_largest_quantized_file_that_fits_is_taken(q8_gguf: Path, random_gguf: Path, tmp_path: Path) -> None:
    shutil.copy(q8_gguf, tmp_path / "q8.gguf")
    shutil.copy(random_gguf, tmp_path / "f32.gguf")
    assert choose_model(tmp_path, PLENTY, None).path.name == "q8.gguf"
    assert choose_model(tmp_path / "f32.gguf", PLENTY, None).path.name == "f32.gguf"
    between = ModelCard.of(random_gguf, PLENTY).memory_bytes  # f32 would take all of it, and a tenth stays free
    assert choose_model(tmp_path, between, None).path.name == "q8.gguf"
    with pytest.raises(ModelError, check=lambda error: error.code == "not-enough-memory"):
        choose_model(tmp_path / "f32.gguf", between, None)


def test_where_nothing_fits_one_is_made(q8_gguf: Path, random_gguf: Path) -> None:
    between = ModelCard.of(random_gguf, PLENTY).memory_bytes
    asked: list[str] = []

    def make(type_: str) -> Path:
        asked.append(type_)
        return random_gguf if type_ == "Q8_0" else q8_gguf

    assert choose_model(random_gguf, between, make).path == q8_gguf
    assert asked == ["Q8_0", "Q6_K"]
    with pytest.raises(ModelError) as error:
        choose_model(random_gguf, 1000, make)
    assert asked == ["Q8_0", "Q6_K"], "types that cannot fit are not made"
    assert "smaller model" in error.value.hint
    with pytest.raises(ModelError) as error:
        choose_model(random_gguf, between, None)
    assert "quantize --type Q8_0" in error.value.hint


def test_the_context_follows_the_memory(smollm2_gguf: Path) -> None:
    roomy, tight = (ModelCard.of(smollm2_gguf, memory) for memory in (PLENTY, 330_000_000))
    assert roomy.n_ctx == 4096
    assert 1024 <= tight.n_ctx < 4096
    assert tight.memory_bytes <= 330_000_000


def as_ollama(template: str, **values: str) -> str:
    """Render the few forms of Go's templates that we write, by jinja's."""
    for go, jinja in (
        ("{{ if .System }}", "{% if System %}"),
        ("{{ else }}", "{% else %}"),
        ("{{ end }}", "{% endif %}"),
    ):
        template = template.replace(go, jinja)
    source = template.replace("{{ .", "{{ ")
    return jinja2.Environment(keep_trailing_newline=True).from_string(source).render(values)


def test_ollama_gets_the_prompts_that_the_model_was_trained_on(q8_gguf: Path, smollm2_gguf: Path) -> None:
    for path in (q8_gguf, smollm2_gguf):
        card = ModelCard.of(path, PLENTY)
        text = modelfile(card)
        template = text.partition('TEMPLATE """')[2].partition('"""')[0]
        user, system = {"role": "user", "content": "How?"}, {"role": "system", "content": "Be brief."}
        asked = as_ollama(template.partition("{{ .Response }}")[0], Prompt="How?")
        assert asked == card.render(user)
        asked = as_ollama(template.partition("{{ .Response }}")[0], Prompt="How?", System="Be brief.")
        assert asked == card.render(system, user)
        answered = as_ollama(template, Prompt="How?", Response="So.").replace("<think>\n", "")
        full = card.render(user, {"role": "assistant", "content": "So."}, user)
        assert full.startswith(answered)
        assert text.startswith(f"FROM ./{card.name}.gguf\n")
        assert 'PARAMETER stop "<|im_end|>"' in text
