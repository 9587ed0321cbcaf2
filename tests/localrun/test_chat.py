"""The chat as a user meets it: one question, pipes, a real terminal, and the conversation's commands."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import PipeInput, create_pipe_input
from prompt_toolkit.output import DummyOutput
from rich.console import Console

from deepdistill.cli import main
from deepdistill.localrun.chat import converse
from deepdistill.localrun.engine import Engine
from deepdistill.localrun.generation import Sampling
from deepdistill.localrun.session import Session
from deepdistill.localrun.terminal import history_path, reader

THINKING, ANSWER = "3+4=7", "The answer is 7 é🦙."
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def deepdistill(*arguments: str, stdin: bytes = b"", **env: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "deepdistill", *arguments],
        input=stdin,
        capture_output=True,
        env=os.environ | env,
        timeout=60,
        check=False,
    )


@pytest.fixture
def no_stdin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))


@pytest.mark.usefixtures("no_stdin")
def test_one_shot_prints_the_answer_alone(scripted_gguf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", str(scripted_gguf), "-p", "what is 3 + 4?"]) == 0
    out, err = capsys.readouterr()
    assert (out, err) == (ANSWER + "\n", "")


@pytest.mark.usefixtures("no_stdin")
def test_json_keeps_thinking_and_answer_apart(scripted_gguf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", str(scripted_gguf), "-p", "what is 3 + 4?", "--json"]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record.pop("tokens_per_s") > 0
    with Engine(scripted_gguf) as engine:
        n_prompt = len(engine.tokenize(engine.render([{"role": "user", "content": "what is 3 + 4?"}])))
    assert record == {
        "model": str(scripted_gguf),
        "content": ANSWER,
        "reasoning_content": THINKING,
        "closed": True,
        "finish_reason": "stop",
        "prompt_tokens": n_prompt,
        "completion_tokens": 10,
        "reasoning_tokens": 4,
    }


@pytest.mark.usefixtures("no_stdin")
def test_a_cut_answer_is_announced(scripted_gguf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", str(scripted_gguf), "-p", "hi", "--max-tokens", "2", "--json"]) == 0
    out, err = capsys.readouterr()
    record = json.loads(out)
    assert (record["closed"], record["content"], record["finish_reason"]) == (False, "", "length")
    assert err == "note: the thinking was cut at 2 tokens; --max-tokens allows more\n"
    long = "x" * 484  # leaves a few tokens of the context
    assert main(["chat", str(scripted_gguf), "-p", long]) == 0
    assert "context of 512 tokens is full" in capsys.readouterr().err


@pytest.mark.usefixtures("no_stdin")
@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["-p", "x" * 600], 1, r"takes \d+ tokens and the context holds 512"),
        ([], 2, "nothing to ask"),
        (["-p", " "], 2, "nothing to ask"),
    ],
)
def test_what_cannot_be_answered_is_one_line_and_a_hint(
    scripted_gguf: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, said: str
) -> None:
    assert main(["chat", str(scripted_gguf), *arguments]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(rf"error: .*{said}.*\nhint: .+\n", err)


def test_piped_text_is_the_question_and_comes_after_the_prompt(scripted_gguf: Path) -> None:
    done = deepdistill("chat", str(scripted_gguf), stdin="größe?\n".encode(), NO_COLOR="1")
    assert (done.returncode, done.stdout.decode(), done.stderr) == (0, ANSWER + "\n", b"")
    both = deepdistill("chat", str(scripted_gguf), "-p", "sum up:", "--json", stdin=b"bad byte \xff\n")
    with Engine(scripted_gguf) as engine:
        prompt = engine.render([{"role": "user", "content": "sum up:\n\nbad byte \ufffd"}])
        assert json.loads(both.stdout)["prompt_tokens"] == len(engine.tokenize(prompt))


def test_an_encoding_without_the_answers_characters_is_no_crash(scripted_gguf: Path) -> None:
    done = deepdistill("chat", str(scripted_gguf), "-p", "hi", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout) == (0, b"The answer is 7 ??.\n")


def test_a_file_cut_short_is_one_line(scripted_gguf: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(scripted_gguf.read_bytes()[:-50_000])
    done = deepdistill("chat", str(cut), "-p", "hi")
    assert done.returncode == 1
    assert re.fullmatch(rb"error: .*cut short.*\nhint: .+\n", done.stderr)


# --- the conversation ---


class Talk:
    """A conversation driven by keys; `said` is what the terminal showed."""

    def __init__(self, engine: Engine, keys: PipeInput, **settings: str | bool | None) -> None:
        options = {"system": None, "thinking": True} | settings
        self.session = Session(engine, sampling=Sampling(max_tokens=50), **options)  # type: ignore[arg-type]
        self._keys, self._screen = keys, io.StringIO()

    def type(self, *lines: str) -> str:
        """Type lines and Ctrl-D; return what was shown."""
        for line in lines:
            self._keys.send_text(line + "\r")
        self._keys.send_text("\x04")
        self._screen.truncate(0)
        converse(self.session, reader(), Console(file=self._screen, width=500))
        return self._screen.getvalue()


@pytest.fixture
def talk(scripted_engine: Engine) -> Iterator[Talk]:
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        yield Talk(scripted_engine, keys)


def test_thinking_is_apart_even_without_colour(talk: Talk) -> None:
    lines = talk.type("hello").splitlines()
    assert "│ 3+4=7" in lines
    assert lines[lines.index("│ 3+4=7") + 1 :][:2] == ["", ANSWER]
    assert any("10 tokens, 4 of them thinking" in line for line in lines)


def test_turns_keep_their_thinking_for_the_template_to_drop(talk: Talk, scripted_engine: Engine) -> None:
    talk.type("one", "two")
    answer = {"role": "assistant", "content": ANSWER, "reasoning_content": THINKING}
    assert talk.session.turns == [
        {"role": "user", "content": "one"},
        answer,
        {"role": "user", "content": "two"},
        answer,
    ]
    assert THINKING not in scripted_engine.render([*talk.session.messages, {"role": "user", "content": "three"}])


def test_lines_are_broken_by_alt_enter_or_a_backslash_and_remembered(talk: Talk) -> None:
    talk.type("a\\\rb\x1b\rc")
    assert talk.session.turns[0]["content"] == "a\nb\nc"
    assert history_path().is_relative_to(os.environ["XDG_DATA_HOME"])
    assert "+a\n+b\n+c\n" in history_path().read_text()
    talk.type("\x1b[A")  # the arrow up brings it back
    assert talk.session.turns[2]["content"] == "a\nb\nc"


def test_commands(talk: Talk, tmp_path: Path) -> None:
    shown = talk.type("/help", "/system Be brief.", "/think off", "/nonsense now", "")
    for command in ("/help", "/system TEXT", "/think on|off", "/reset", "/save FILE", "/quit"):
        assert command in shown
    assert "there is no /nonsense" in shown
    assert (talk.session.system, talk.session.thinking) == ("Be brief.", False)
    assert talk.session.turns == [], "commands are not sent to the model"
    talk.type("/think on", "hi", f"/save {tmp_path}/talk.json")
    saved = json.loads((tmp_path / "talk.json").read_text())
    assert [message["role"] for message in saved["messages"]] == ["system", "user", "assistant"]
    assert saved["messages"][2]["reasoning_content"] == THINKING
    talk.type("/reset", "/system -")
    assert talk.session.messages == []
    assert "hello" not in talk.type("/quit", "hello"), "nothing is read after /quit"


def test_save_overwrites_nothing(talk: Talk, tmp_path: Path) -> None:
    there = tmp_path / "there.json"
    there.write_text("mine")
    shown = talk.type("hi", f"/save {there}", f"/save {tmp_path}/no/such/folder.json")
    assert f"{there} is there already" in shown
    assert "cannot write" in shown
    assert there.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [there]


def test_a_slash_after_a_space_is_a_message(talk: Talk) -> None:
    talk.type(" /etc/hosts?")
    assert talk.session.turns[0]["content"] == "/etc/hosts?"


def test_a_full_context_is_announced_and_reset_goes_on(talk: Talk) -> None:
    shown = talk.type("y" * 420, "z" * 60, "/reset", "again")
    assert re.search(r"takes \d+ tokens and the context holds 512", shown)
    assert [turn["content"] for turn in talk.session.turns] == ["again", ANSWER]


def test_a_refused_turn_leaves_the_conversation_as_it_was(talk: Talk) -> None:
    talk.type("one", "y" * 600)
    assert [turn["content"] for turn in talk.session.turns] == ["one", ANSWER]


def test_ctrl_c_stops_the_answer_and_not_the_chat(
    talk: Talk, scripted_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream, calls = Engine.stream, iter([True, False])

    def interrupted(engine: Engine, *arguments: object) -> Iterator[object]:
        stop = next(calls)
        for step in stream(engine, *arguments):  # type: ignore[arg-type]
            yield step
            if stop and "answer" in step.text:
                os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Engine, "stream", interrupted)
    shown = talk.type("one", "two")
    assert "(stopped)" in shown
    assert [turn["content"] for turn in talk.session.turns] == ["one", "The answer", "two", ANSWER]


# --- a real terminal ---


class Terminal:
    """A program on a pseudo-terminal."""

    def __init__(self, *arguments: str, **env: str) -> None:
        self._fd, slave = pty.openpty()
        # Its own terminal, so that Ctrl-C is a signal to it.
        code = (
            "import fcntl, sys, termios\nfcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
            "from deepdistill.cli import main\nsys.exit(main())"
        )
        command = [sys.executable, "-c", code, *arguments]
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True, env=os.environ | env
        )
        os.close(slave)
        self.shown = ""

    def press(self, keys: str) -> None:
        os.write(self._fd, keys.encode())

    def wait_for(self, found: Callable[[str], bool], seconds: float = 30) -> str:
        """Read until the text shown since the last call, without colours, satisfies `found`."""
        new, deadline = "", time.monotonic() + seconds
        while not found(ESCAPES.sub("", new)):
            assert time.monotonic() < deadline, f"not shown in {new!r}"
            if select.select([self._fd], [], [], 0.1)[0]:
                try:
                    new += os.read(self._fd, 65536).decode("utf-8", "replace")
                except OSError:  # the program ended
                    break
        self.shown += new
        return ESCAPES.sub("", new)

    def ended(self) -> int:
        self.wait_for(lambda _: False)
        return self.process.wait(30)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._fd)


def test_a_real_terminal_shows_thinking_dim_and_leaves_on_ctrl_d(scripted_gguf: Path) -> None:
    with Terminal("chat", str(scripted_gguf), TERM="xterm-256color", PROMPT_TOOLKIT_NO_CPR="1") as terminal:
        terminal.wait_for(lambda text: "›" in text)
        terminal.press("hello\r")
        terminal.wait_for(lambda text: "›" in text.partition("tokens/s")[2])
        assert re.search(r"\x1b\[2m3\+4", terminal.shown), "thinking is dim"
        assert re.search(r"\x1b\[0mThe|\nThe", terminal.shown), "the answer is not"
        terminal.press("half\x03")  # Ctrl-C drops the line
        terminal.wait_for(lambda text: "›" in text.partition("half")[2])
        terminal.press("\x04")
        assert terminal.ended() == 0


@pytest.mark.slow
def test_a_real_ctrl_c_stops_a_real_answer(smollm2_gguf: Path) -> None:
    with Terminal("chat", str(smollm2_gguf), TERM="xterm-256color", PROMPT_TOOLKIT_NO_CPR="1") as terminal:
        terminal.wait_for(lambda text: "›" in text)
        terminal.press("Tell me a very long story about llamas.\r")
        terminal.wait_for(lambda text: text.count(" ") > 60)
        terminal.press("\x03")
        terminal.wait_for(lambda text: "›" in text.partition("(stopped)")[2])
        terminal.press("Say hi.\r")
        terminal.wait_for(lambda text: "›" in text.partition("tokens/s")[2])
        terminal.press("\x04")
        assert terminal.ended() == 0
