"""The page for phones and browsers: in a headless Chromium, beside the native engine, and with the network cut.

Chromium is driven over its DevTools pipe, without a client library. `$DEEPDISTILL_STUDENT` may name a trained student.
"""

from __future__ import annotations

import base64
import functools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from select import select
from types import TracebackType
from typing import Any, Self

import pytest

from deepdistill.errors import ModelError
from deepdistill.localrun.core.generation import Sampling
from deepdistill.localrun.engine.engine import Engine
from deepdistill.localrun.families.thinking import THINK, ThinkingParser
from deepdistill.localrun.phone import phone
from deepdistill.localrun.phone.phone import export_phone

PAGE = Path(phone.__file__).parents[1] / "web"

# Chromium reads commands from descriptor 3 and writes to 4, each message ended by a null byte.
_LAUNCH = """import os, sys
r, w, *command = sys.argv[1:]
r, w = os.dup(int(r)), os.dup(int(w))
r, w = (os.dup(fd) if fd < 5 else fd for fd in (r, w))
os.dup2(r, 3); os.dup2(w, 4)
os.execvp(command[0], command)"""
_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def find_chromium() -> str | None:
    """Return a browser's path: `$CHROMIUM`, else what is installed."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, _NAMES)), None)


class Chromium:
    """A browser with a profile folder and one page; `requested` collects every URL that page and workers ask for."""

    def __init__(self, path: str, profile: Path, *flags: str) -> None:
        command_r, self._out = os.pipe()
        self._in, answer_w = os.pipe()
        browser = [
            *(path, "--headless=new", "--remote-debugging-pipe", f"--user-data-dir={profile}", "--no-sandbox"),
            *("--disable-dev-shm-usage", "--no-first-run", "--disable-component-update", "--hide-scrollbars", *flags),
        ]
        launch = [sys.executable, "-c", _LAUNCH, str(command_r), str(answer_w), *browser, "about:blank"]
        self._process = subprocess.Popen(
            launch,
            pass_fds=(command_r, answer_w),
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            stdin=subprocess.DEVNULL,
        )
        os.close(command_r)
        os.close(answer_w)
        self._buffer, self._n, self._answers = b"", 0, dict[int, dict[str, Any]]()
        self.requested: list[str] = []
        self.console: list[str] = []
        pages = [t for t in self._call(None, "Target.getTargets")["targetInfos"] if t["type"] == "page"]
        attached = self._call(None, "Target.attachToTarget", targetId=pages[0]["targetId"], flatten=True)
        self._page = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        self.call("Target.setAutoAttach", autoAttach=True, waitForDebuggerOnStart=False, flatten=True)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a DevTools command to the page; return its result."""
        return self._call(self._page, method, **parameters)

    def evaluate(self, expression: str) -> Any:
        """Return the value of a JavaScript expression, or of the promise that it is."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise AssertionError(result["exceptionDetails"].get("exception", {}).get("description", result))
        return result["result"].get("value")

    def wait(self, expression: str, seconds: float, explain: Callable[[], object] = lambda: "") -> None:
        """Return as soon as the expression is true; a page that is being loaded counts as not yet."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                if self.evaluate(f"Boolean({expression})"):
                    return
            except (AssertionError, RuntimeError):
                pass
            time.sleep(0.1)
        raise AssertionError(f"{expression} did not come true in {seconds} s: {explain()} {self.console}")

    def resize(self, width: int, height: int, *, mobile: bool) -> None:
        """Take a window's size, in CSS pixels."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=2, mobile=mobile)

    def screenshot(self, path: Path) -> None:
        """Write what is seen as a PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def close(self) -> None:
        """End the browser and its processes."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._in)
        os.close(self._out)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _call(self, session: str | None, method: str, **parameters: Any) -> dict[str, Any]:
        self._n += 1
        number = self._n
        message = {"id": number, "method": method, "params": parameters} | ({"sessionId": session} if session else {})
        os.write(self._out, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + 60
        while number not in self._answers:
            self._read(end, method)
        answer = self._answers.pop(number)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return dict(answer["result"])

    def _read(self, end: float, method: str) -> None:
        ready, _, _ = select([self._in], [], [], max(0.0, end - time.monotonic()))
        data = os.read(self._in, 1 << 20) if ready else b""
        if not data:
            raise AssertionError(f"Chromium gives no answer to {method}")
        *messages, self._buffer = (self._buffer + data).split(b"\0")
        for message in map(json.loads, messages):
            if "id" in message:
                self._answers[message["id"]] = message
            else:
                self._notice(message)

    def _notice(self, event: dict[str, Any]) -> None:
        parameters = event.get("params", {})
        match event["method"]:
            case "Network.requestWillBeSent":
                self.requested.append(parameters["request"]["url"])
            case "Target.attachedToTarget":  # a worker: watch what it asks for too, without waiting for the answer
                self._n += 1
                message = {
                    "id": self._n,
                    "method": "Network.enable",
                    "params": {},
                    "sessionId": parameters["sessionId"],
                }
                os.write(self._out, json.dumps(message).encode() + b"\0")
            case "Log.entryAdded":
                self.console.append(parameters["entry"]["text"])
            case "Runtime.consoleAPICalled":
                self.console.append(
                    " ".join(str(arg.get("value", arg.get("description"))) for arg in parameters["args"])
                )
            case "Runtime.exceptionThrown":
                self.console.append(json.dumps(parameters["exceptionDetails"])[:2000])


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


def ask(browser: Chromium, question: str) -> tuple[str, str, int]:
    """Type a question, wait for the whole answer; return its thinking, its answer and the tokens of thinking."""
    browser.evaluate(f"document.getElementById('question').value = {json.dumps(question)}")
    browser.evaluate("document.getElementById('form').requestSubmit()")
    browser.wait("[...document.querySelectorAll('.answer')].at(-1).dataset.done", 300)
    assert not browser.evaluate("document.querySelectorAll('.bad').length"), browser.evaluate("document.body.innerText")
    last = "[...document.querySelectorAll('{}')].at(-1).textContent"
    thinking, answer, summary = (
        str(browser.evaluate(last.format(it))) for it in ("details > div", ".answer", "summary")
    )
    return thinking, answer, int(re.findall(r"\d+", summary)[0])


@pytest.fixture(scope="module")
def native(student: Path) -> tuple[str, str, int]:
    """What the native engine thinks and answers, and the tokens of thinking."""
    with Engine(student, n_ctx=4096) as engine:
        said = {"thinking": "", "answer": ""}
        for step in engine.stream(engine.prompt([{"role": "user", "content": QUESTION}]), Sampling(max_tokens=2048)):
            said[step.part] += step.text
    return said["thinking"], said["answer"], step.n_reasoning


@pytest.mark.slow
def test_the_page_answers_as_the_engine_does_and_without_a_network(
    web: Path, browser: Chromium, native: tuple[str, str, int]
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
def test_the_slower_build_answers_the_same(web: Path, browser: Chromium, native: tuple[str, str, int]) -> None:
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
    web: Path, browser: Chromium, native: tuple[str, str, int]
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
