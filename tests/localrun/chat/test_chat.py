"""The chat as a user meets it: one question, pipes, a real terminal, and the conversation's commands."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

import pytest

from deepdistill.cli import main
from deepdistill.errors import DeepDistillError
from deepdistill.localrun.chat.chat import chat
from deepdistill.localrun.chat.conversations import Store
from deepdistill.localrun.chat.session import Question, Session
from deepdistill.localrun.core.generation import Sampling
from deepdistill.localrun.engine.engine import Engine
from deepdistill.localrun.recipe import ChatRecipe, SamplingRecipe

BuildGGUF = Callable[..., Path]
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
        "notes": [],
    }


@pytest.mark.usefixtures("no_stdin")
def test_a_cut_answer_is_announced(scripted_gguf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", str(scripted_gguf), "-p", "hi", "--max-tokens", "2", "--json"]) == 0
    out, err = capsys.readouterr()
    record = json.loads(out)
    assert (record["closed"], record["content"], record["finish_reason"]) == (False, "", "length")
    assert err.endswith("note: the thinking was cut off after 2 tokens; --max-tokens allows more\n")
    long = "x" * 484  # leaves a few tokens of the context
    assert main(["chat", str(scripted_gguf), "-p", long]) == 0
    assert "context of 512 tokens is full" in capsys.readouterr().err


WEATHER = {"name": "weather", "description": "of a city", "parameters": {"type": "object"}}
CALLS = b'Let me see.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
SHOWS_TOOLS = (
    "{% if tools %}{{ tools[0].function.name }}: {{ tools[0].function.description }}\n{% endif %}"
    "{{ messages[-1].content + '\n' }}"
)


@pytest.mark.usefixtures("no_stdin")
def test_tools_are_offered_and_calls_come_out_in_openais_form(
    tmp_path: Path, build_gguf: BuildGGUF, capsys: pytest.CaptureFixture[str]
) -> None:
    model = build_gguf(tmp_path / "calls.gguf", script=[CALLS], template=SHOWS_TOOLS)
    (tmp_path / "tools.json").write_text(json.dumps([{"type": "function", "function": WEATHER}]))
    (tmp_path / "other.json").write_text(json.dumps(WEATHER | {"name": "other"}))
    ask = ["chat", str(model), "-p", "is it warm?", "--tools"]
    assert main([*ask, str(tmp_path / "tools.json"), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    (call,) = record["tool_calls"]
    assert record["content"] == "Let me see."
    assert (call["type"], call["function"]["name"]) == ("function", "weather")
    assert json.loads(call["function"]["arguments"]) == {"city": "Paris"}
    with Engine(model) as engine:
        assert record["prompt_tokens"] == len(engine.tokenize("weather: of a city\nis it warm?\n"))
    assert main([*ask, str(tmp_path / "tools.json")]) == 0
    said, printed = capsys.readouterr().out.splitlines()
    assert said == "Let me see."
    assert json.loads(printed)["function"] == call["function"]
    assert main([*ask, str(tmp_path / "other.json"), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["tool_calls"], record["content"]) == ([], CALLS.decode())


@pytest.mark.parametrize("text", ["{", "[]", "[1]", '[{"type": "function"}]', '{"name": 3}'])
def test_tools_that_are_none_are_refused(
    tmp_path: Path, scripted_gguf: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tools.json").write_text(text)
    assert main(["chat", str(scripted_gguf), "-p", "hi", "--tools", str(tmp_path / "tools.json")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"error: .*tool.*\nhint: a list of .*\n", err)


def test_every_sampler_can_be_asked_for(random_gguf: Path) -> None:
    def say(*flags: str) -> str:
        ask = ("chat", str(random_gguf), "-p", "hi", "--json", "--no-loop-guard", "--max-tokens", "40")
        done = deepdistill(*ask, *flags)
        record = json.loads(done.stdout)
        return f"{record['reasoning_content']} {record['content']}"

    greedy = say()
    hot = say("--temperature", "5")
    assert hot != greedy
    for flags in (["--top-k", "1"], ["--min-p", "1"], ["--top-p", "0"]):
        assert say("--temperature", "5", *flags) == greedy
    assert say("--repeat-penalty", "1000") != greedy


@pytest.mark.usefixtures("no_stdin")
def test_more_context_than_the_model_was_trained_for_is_said(
    scripted_gguf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["chat", str(scripted_gguf), "-p", "hi", "--context", "1024"]) == 0
    out, err = capsys.readouterr()
    assert (out, err.count("note:")) == (ANSWER + "\n", 1)
    assert "trained for 512 tokens of context" in err


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


# --- a kept conversation ---


@pytest.fixture
def kept(scripted_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Two conversations on disk, the older one first."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    store = Store()
    paths = [store.folder / "a.json", store.folder / "b.json"]
    with Engine(scripted_gguf, n_threads=1) as engine:
        for i, path in enumerate(paths):
            session = Session(engine, system="Be brief.", sampling=Sampling(max_tokens=50, seed=7))
            list(session.ask(Question(f"question {i}")))
            store.write(path, session.record())
            os.utime(path, (i, i))
    return paths


def questions(path: Path) -> list[str]:
    return [message["content"] for message in json.loads(path.read_text())["messages"] if message["role"] == "user"]


def test_one_question_goes_on_with_the_newest_conversation_and_its_model(
    kept: list[Path], scripted_gguf: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("and then?"))
    assert chat(None, ChatRecipe(n_ctx=400), resume="newest", json_output=True) == 0
    record = json.loads(capsys.readouterr().out)
    with Engine(scripted_gguf) as engine:
        system, asked, answered = json.loads(kept[0].read_text())["messages"]
        asked["content"] = "question 1"
        prompt = engine.render([system, asked, answered, {"role": "user", "content": "and then?"}])
        assert record["prompt_tokens"] == len(engine.tokenize(prompt)), "the model sees what was said"
    assert [questions(path) for path in kept] == [["question 0"], ["question 1", "and then?"]]


def test_a_number_on_standard_input_picks_one_and_the_rest_is_the_question(
    kept: list[Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("2\nmore\n"))
    assert chat(None, ChatRecipe(sampling=SamplingRecipe(temperature=0.5)), resume="pick") == 0
    out, err = capsys.readouterr()
    assert out == ANSWER + "\n"
    assert re.search(r" 1  .*question 1\n 2  .*question 0\n", err)
    assert [questions(path) for path in kept] == [["question 0", "more"], ["question 1"]]
    sampling = json.loads(kept[0].read_text())["sampling"]
    assert (sampling["temperature"], sampling["seed"]) == (0.5, 7), "what is given goes before what was kept"


def test_what_is_not_to_be_kept_is_not(kept: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("more"))
    assert chat(None, ChatRecipe(keep=False), resume="newest") == 0
    assert questions(kept[1]) == ["question 1"]


@pytest.mark.parametrize(
    ("number", "spoil", "code"),
    [
        ("3", lambda path: None, "no-such-conversation"),
        ("x", lambda path: None, "no-such-conversation"),
        ("2", lambda path: path.write_text(path.read_text().replace("scripted.gguf", "gone.gguf")), "no-such-model"),
        ("2", lambda path: path.write_text("{"), "no-such-conversation"),
    ],
)
def test_a_conversation_that_cannot_go_on_is_said(
    kept: list[Path], number: str, spoil: Callable[[Path], object], code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(kept[0])
    os.utime(kept[0], (0, 0))
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{number}\nmore"))
    with pytest.raises(DeepDistillError, check=lambda error: error.code == code):
        chat(None, resume="pick")


def test_nothing_to_continue_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    with pytest.raises(DeepDistillError, check=lambda error: error.code == "no-such-conversation"):
        chat(None, resume="newest", prompt="hi")


def test_a_pipe_loads_nothing_that_draws(scripted_gguf: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom deepdistill.localrun.chat.chat import chat\n"
        "chat(sys.argv[1], prompt='hi')\n"
        "print(*({'rich', 'prompt_toolkit', 'pygments', 'huggingface_hub'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, str(scripted_gguf)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True)
    assert done.stdout == f"{ANSWER}\n\n"


def test_a_reader_that_has_enough_is_no_crash(scripted_gguf: Path) -> None:
    command = f"{sys.executable} -m deepdistill chat {scripted_gguf} -p hi | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert "Traceback" not in done.stderr


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
        assert re.match(r"loading scripted\.gguf \.\.\.\r {25}\r", terminal.shown), "it says why one waits, and is gone"
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
