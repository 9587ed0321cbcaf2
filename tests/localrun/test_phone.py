"""The folder for phones: which file goes in, what it says, and the page in a real browser beside the native engine."""

from __future__ import annotations

import functools
import json
import os
import random
import shutil
import subprocess
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import gguf
import jinja2
import numpy as np
import pytest

from deepdistill.errors import ArtifactError, ModelError
from deepdistill.localrun import phone
from deepdistill.localrun.cards import ModelCard, modelfile
from deepdistill.localrun.engine import Engine
from deepdistill.localrun.generation import Sampling
from deepdistill.localrun.phone import choose_model, export_phone
from deepdistill.localrun.thinking import THINK, ThinkingParser

from .chromium import Chromium, find_chromium

PAGE = Path(phone.__file__).parent / "page"
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
    with pytest.raises(ArtifactError, match="there already"):
        export_phone(q8_gguf, tmp_path / "out")
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(q8_gguf.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match="cut short"):
        export_phone(broken, tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.gguf", "out"]


def test_a_failed_fetch_leaves_nothing(q8_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(folder: Path, **_: object) -> list[str]:
        raise ModelError("no network")

    monkeypatch.setattr(phone, "unpack_wllama", fail)
    with pytest.raises(ModelError, match="no network"):
        export_phone(q8_gguf, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_largest_quantized_file_that_fits_is_taken(q8_gguf: Path, random_gguf: Path, tmp_path: Path) -> None:
    shutil.copy(q8_gguf, tmp_path / "q8.gguf")
    shutil.copy(random_gguf, tmp_path / "f32.gguf")
    assert choose_model(tmp_path, PLENTY, None).path.name == "q8.gguf"
    assert choose_model(tmp_path / "f32.gguf", PLENTY, None).path.name == "f32.gguf"
    between = ModelCard.of(random_gguf, PLENTY).memory_bytes  # f32 would take all of it, and a tenth stays free
    assert choose_model(tmp_path, between, None).path.name == "q8.gguf"
    with pytest.raises(ModelError, match="of memory"):
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


def test_the_page_names_no_other_address() -> None:
    for path in PAGE.iterdir():
        text = path.read_text().replace("http://www.w3.org/2000/svg", "")
        assert "://" not in text, f"{path.name} names an address"
    policy = (PAGE / "index.html").read_text().partition('Content-Security-Policy" content="')[2].partition('"')[0]
    assert policy.startswith("default-src 'none';")
    assert "unsafe-inline" not in policy
    assert "http" not in policy


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_the_page_splits_thinking_as_the_terminal_does(tmp_path: Path) -> None:
    rng = random.Random(0)
    parts = ["<think>", "</think>", "<thi", "</", "think>", "\n", "\n\n", " ", "a", "12 < 7", "é🦙"]
    cases = []
    for _ in range(400):
        text = "".join(rng.choices(parts, k=rng.randrange(9)))
        cuts = sorted(rng.randrange(len(text) + 1) for _ in range(rng.randrange(5)))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        cases.append((pieces, rng.random() < 0.5))
    script = tmp_path / "run.mjs"
    script.write_text(f"""
        import {{ readFileSync }} from "node:fs";
        const {{ ThinkingParser }} = await import({json.dumps((PAGE / "thinking.js").as_uri())});
        const cases = JSON.parse(readFileSync(0, "utf8"));
        console.log(JSON.stringify(cases.map(([pieces, inside]) => {{
          const parser = new ThinkingParser({{ open: "<think>", close: "</think>" }}, inside);
          const out = pieces.flatMap((piece) => [[...parser.feed(piece), ["at", parser.part]]]);
          return [...out, parser.finish(), parser.opened];
        }})));
    """)
    (tmp_path / "package.json").write_text('{"type": "module"}')
    run = subprocess.run(["node", str(script)], input=json.dumps(cases), capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    for (pieces, inside), result in zip(cases, json.loads(run.stdout), strict=True):
        parser = ThinkingParser(inside, THINK)
        expected: list[Any] = [[*map(list, parser.feed(piece)), ["at", parser.part]] for piece in pieces]
        assert result == [*expected, [*map(list, parser.finish())], parser.opened], (pieces, inside)


class QuietHandler(SimpleHTTPRequestHandler):
    """What `python -m http.server` runs, without its log."""

    def log_message(self, *arguments: object) -> None:
        pass


class StaticServer:
    """A folder on localhost, until it is closed."""

    def __init__(self, folder: Path) -> None:
        handler = functools.partial(QuietHandler, directory=str(folder))
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()
        self.port = self._server.server_port

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture(scope="module")
def student(smollm2_gguf: Path) -> Path:
    """A trained student, `$DEEPDISTILL_STUDENT`; without one the model that the demo begins with."""
    return Path(os.environ.get("DEEPDISTILL_STUDENT") or smollm2_gguf)


@pytest.fixture(scope="module")
def web(student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The student's page."""
    if find_chromium() is None:
        pytest.skip("no Chromium: apt-get install chromium, or name one in $CHROMIUM")
    out = tmp_path_factory.mktemp("phone") / "out"
    try:
        export_phone(student, out)
    except ModelError as error:
        pytest.skip(f"wllama cannot be had: {error}")
    return out / "web"


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Chromium]:
    """A browser that has seen nothing yet."""
    path = find_chromium()
    assert path
    rules = "--host-resolver-rules=MAP phone.test 127.0.0.1"
    with Chromium(path, tmp_path / "profile", rules) as chromium:
        yield chromium


QUESTION = "State the final answer to the following arithmetic problem: 12 + 7 - 5 ="


def open_page(browser: Chromium, url: str) -> str:
    """Load the page until the model is ready; return what it says of itself."""
    browser.call("Page.navigate", url=url)
    browser.wait("document.body.dataset.ready", 120, lambda: browser.evaluate("document.body.innerText"))
    return str(browser.evaluate("document.getElementById('state').textContent"))


def ask(browser: Chromium, question: str) -> tuple[str, str]:
    """Type a question, wait for the whole answer; return its thinking and its answer."""
    browser.evaluate(f"document.getElementById('question').value = {json.dumps(question)}")
    browser.evaluate("document.getElementById('form').requestSubmit()")
    browser.wait("[...document.querySelectorAll('.answer')].at(-1).dataset.done", 300)
    assert not browser.evaluate("document.querySelectorAll('.bad').length"), browser.evaluate("document.body.innerText")
    last = "[...document.querySelectorAll('{}')].at(-1).textContent"
    return str(browser.evaluate(last.format("details > div"))), str(browser.evaluate(last.format(".answer")))


@pytest.fixture(scope="module")
def native(student: Path) -> tuple[str, str]:
    """What the native engine thinks and answers."""
    with Engine(student, n_ctx=4096) as engine:
        said = {"thinking": "", "answer": ""}
        for step in engine.stream(engine.prompt([{"role": "user", "content": QUESTION}]), Sampling(max_tokens=2048)):
            said[step.part] += step.text
    return said["thinking"], said["answer"]


@pytest.mark.slow
def test_the_page_answers_as_the_engine_does_and_without_a_network(
    web: Path, browser: Chromium, native: tuple[str, str]
) -> None:
    server = StaticServer(web)
    url = f"http://localhost:{server.port}/"
    try:
        assert "works offline" in open_page(browser, url)
        assert browser.evaluate("crossOriginIsolated"), "the service worker's headers give threads"
        assert ask(browser, QUESTION) == native
    finally:
        server.close()
    offline = {"offline": True, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    browser.call("Network.emulateNetworkConditions", **offline)
    assert "works offline" in open_page(browser, url)
    assert ask(browser, QUESTION) == native
    ours = (url, f"blob:{url}")
    assert [asked for asked in browser.requested if not asked.startswith((*ours, "data:"))] == []
    assert browser.console == []


@pytest.mark.slow
def test_the_slower_build_answers_the_same(web: Path, browser: Chromium, native: tuple[str, str]) -> None:
    """Without stack switching, as on iPhones, wllama's other build runs: from our folder, not from a CDN."""
    server = StaticServer(web)
    try:
        browser.call("Page.addScriptToEvaluateOnNewDocument", source="delete WebAssembly.Suspending")
        open_page(browser, f"http://localhost:{server.port}/")
        assert ask(browser, QUESTION) == native
        assert any(asked.endswith("/wllama/compat.wasm") for asked in browser.requested)
        assert not any(asked.endswith("/wllama/wllama.wasm") for asked in browser.requested)
    finally:
        server.close()


@pytest.mark.slow
def test_without_https_it_runs_and_says_that_it_keeps_nothing(
    web: Path, browser: Chromium, native: tuple[str, str]
) -> None:
    server = StaticServer(web)
    try:
        assert "not kept for offline use" in open_page(browser, f"http://phone.test:{server.port}/")
        assert ask(browser, QUESTION) == native
    finally:
        server.close()


@pytest.mark.slow
def test_stop_ends_an_answer_and_the_next_question_is_answered(web: Path, browser: Chromium) -> None:
    server = StaticServer(web)
    try:
        open_page(browser, f"http://localhost:{server.port}/")
        browser.evaluate("document.getElementById('question').value = 'Write a long story about a dog.'")
        browser.evaluate("document.getElementById('form').requestSubmit()")
        browser.wait("document.querySelector('.note')?.textContent.includes('tokens/s')", 60)
        browser.evaluate("document.getElementById('stop').click()")
        browser.wait("document.querySelector('.answer').dataset.done", 60)
        assert browser.evaluate("document.querySelector('.note').textContent").endswith("stopped")
        assert ask(browser, QUESTION)[1]
    finally:
        server.close()
