"""Drive a headless Chromium over its DevTools pipe, which needs no client library."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from select import select
from types import TracebackType
from typing import Any, Self

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
