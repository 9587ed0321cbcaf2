"""The conversation at a terminal: turns, commands, what is kept and what is said when something does not go."""

from __future__ import annotations

import io
import json
import os
import re
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import PipeInput, create_pipe_input
from prompt_toolkit.output import DummyOutput
from rich.console import Console

from deepdistill.errors import DeepDistillError
from deepdistill.localrun.chat.commands import COMMANDS, run_command
from deepdistill.localrun.chat.conversations import Store, read_conversation
from deepdistill.localrun.chat.dialogue import Dialogue
from deepdistill.localrun.chat.keyboard import history_path
from deepdistill.localrun.chat.repl import converse
from deepdistill.localrun.chat.session import Question, Session
from deepdistill.localrun.core.generation import Guidance, Sampling
from deepdistill.localrun.engine.engine import Engine
from deepdistill.localrun.engine.stream import Step
from deepdistill.localrun.engine.vision import MARKER

THINKING, ANSWER = "3+4=7", "The answer is 7 é🦙."


class Talk:
    """A conversation driven by keys; what `type` returns is what the terminal showed."""

    def __init__(self, engine: Engine, keys: PipeInput, store: Store) -> None:
        session = Session(engine, sampling=Sampling(max_tokens=50))
        self.dialogue = Dialogue(session, open_engine=lambda path: Engine(path, n_threads=1), store=store)
        self._keys, self.store = keys, store

    @property
    def session(self) -> Session:
        return self.dialogue.session

    @property
    def asked(self) -> list[str]:
        return [turn["content"] for turn in self.session.turns[::2]]

    def type(self, *lines: str) -> str:
        """Type lines and Ctrl-D; return what was shown."""
        for line in lines:
            self._keys.send_text(line + "\r")
        self._keys.send_text("\x04")
        screen = io.StringIO()
        self.dialogue.console = Console(file=screen, width=500)
        converse(self.dialogue)
        return screen.getvalue()


@pytest.fixture
def talk(scripted_gguf: Path, tmp_path: Path) -> Iterator[Talk]:
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        talk = Talk(Engine(scripted_gguf, n_threads=1), keys, Store(tmp_path / "kept"))
        yield talk
        talk.session.engine.close()


def kept(talk: Talk) -> list[list[str]]:
    """The questions of each conversation on disk, the newest first."""
    return [[turn["content"] for turn in record.turns[::2]] for _, record in talk.store.newest_first()]


def test_thinking_is_apart_even_without_colour(talk: Talk) -> None:
    lines = talk.type("hello").splitlines()
    assert "│ 3+4=7" in lines
    summary, blank, answer = lines[lines.index("│ 3+4=7") + 1 :][:3]
    assert re.fullmatch(r"╰ thought for \d+\.\d s, 4 tokens", summary)
    assert (blank, answer) == ("", ANSWER)
    assert any("10 tokens, 4 of them thinking" in line for line in lines)


def test_folded_thinking_is_one_line_and_can_be_seen_afterwards(talk: Talk) -> None:
    shown = talk.type("/think fold", "hello")
    assert THINKING not in shown
    assert re.search(rf"▸ thought for \d+\.\d s, 4 tokens\n{ANSWER}", shown)
    assert "│ 3+4=7" in talk.type("/think")
    assert "│ 3+4=7" in talk.type("\x14"), "Ctrl-T unfolds the last thinking"
    assert "│ 3+4=7" in talk.type("again"), "and what comes"


def test_turns_keep_their_thinking_for_the_template_to_drop(talk: Talk) -> None:
    talk.type("one", "two")
    answer = {"role": "assistant", "content": ANSWER, "reasoning_content": THINKING}
    assert talk.session.turns == [
        {"role": "user", "content": "one"},
        answer,
        {"role": "user", "content": "two"},
        answer,
    ]
    prompt = talk.session.engine.render([*talk.session.messages, {"role": "user", "content": "three"}])
    assert THINKING not in prompt


def test_lines_are_broken_by_alt_enter_or_a_backslash_and_remembered(talk: Talk) -> None:
    talk.type("a\\\rb\x1b\rc")
    assert talk.session.turns[0]["content"] == "a\nb\nc"
    assert history_path().is_relative_to(os.environ["XDG_DATA_HOME"])
    assert "+a\n+b\n+c\n" in history_path().read_text()
    talk.type("\x1b[A")  # the arrow up brings it back
    assert talk.session.turns[2]["content"] == "a\nb\nc"


def test_nothing_is_kept_if_nothing_is_to_be(talk: Talk) -> None:
    talk.dialogue.store = None
    before = history_path().read_bytes() if history_path().exists() else b""
    shown = talk.type("between us", "/save")
    assert "is not kept" in shown
    assert kept(talk) == []
    assert (history_path().read_bytes() if history_path().exists() else b"") == before


def test_settings(talk: Talk) -> None:
    shown = talk.type("/system Be brief.", "/think off", "/budget 7", "/temp 0.5", "")
    assert "system message: Be brief." in shown
    assert "held to 7 tokens" in shown
    session = talk.session
    assert (session.system, session.think, session.guidance.think_budget) == ("Be brief.", "off", 7)
    assert session.sampling.temperature == 0.5
    assert session.turns == [], "commands are not sent to the model"
    talk.type("/system -", "/think auto", "/budget off", "/temp 0")
    assert (session.system, session.think, session.guidance.think_budget) == (None, "auto", None)


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("/nonsense now", "no-such-command"),
        ("/ed", "no-such-command"),
        ("/think loudly", "value-broken"),
        ("/budget soon", "value-broken"),
        ("/budget -1", "value-broken"),
        ("/temp hot", "value-broken"),
        ("/temp nan", "value-broken"),
        ("/file /no/such/file", "no-such-file"),
        ("/file /", "no-such-file"),
        ("/image cat.png", "no-projector"),
        ("/model /no/such.gguf", "no-such-model"),
        ("/load /no/such.json", "file-unreadable"),
        ("/export pdf", "value-broken"),
        ("/retry", "no-turn"),
        ("/edit", "no-turn"),
        ("/undo", "no-turn"),
    ],
)
def test_what_a_command_cannot_do_is_one_line_and_sent_to_nobody(talk: Talk, line: str, code: str) -> None:
    with pytest.raises(DeepDistillError) as refused:
        run_command(talk.dialogue, line)
    error = refused.value
    assert error.code == code
    assert f"{error.message}; {error.hint}".removesuffix("; ") in talk.type(line)
    assert talk.session.turns == []


def test_every_command_is_in_the_help_and_the_completion(talk: Talk) -> None:
    shown = talk.type("/help")
    names = "model system think budget temp file image retry edit undo save load export stats clear quit"
    for name in (f"/{name}" for name in names.split(" ")):
        assert f"\n{name}" in shown
        assert name in COMMANDS


def test_saved_conversations(talk: Talk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    talk.type(
        "/system Be brief.", "Why, what?", "/save talk.json", "/save talk.md", "/export md", "/export json x.json"
    )
    saved = json.loads(Path("talk.json").read_text())
    assert [message["role"] for message in saved["messages"]] == ["system", "user", "assistant"]
    assert saved["messages"][2]["reasoning_content"] == THINKING
    assert Path("talk.md").read_text() == Path("why-what.md").read_text()
    assert f"**user**\n\nWhy, what?\n\n**assistant**\n\n> {THINKING}\n\n{ANSWER}" in Path("talk.md").read_text()
    talk.type("/clear", "/load x.json", "and then?")
    assert talk.asked == ["Why, what?", "and then?"]
    assert talk.session.system == "Be brief."


def test_save_overwrites_nothing(talk: Talk, tmp_path: Path) -> None:
    there = tmp_path / "there.json"
    there.write_text("mine")
    shown = talk.type("hi", f"/save {there}", f"/save {tmp_path}/no/such/folder.json")
    assert f"{there} already exists" in shown
    assert f"cannot write {tmp_path}/no/such/folder.json" in shown
    assert there.read_text() == "mine"
    assert sorted(tmp_path.iterdir()) == [tmp_path / "kept", there]


def test_a_slash_after_a_space_is_a_message(talk: Talk) -> None:
    talk.type(" /etc/hosts?")
    assert talk.session.turns[0]["content"] == "/etc/hosts?"


def test_a_full_context_is_announced_and_clear_goes_on(talk: Talk) -> None:
    shown = talk.type("y" * 420, "z" * 60, "/clear", "again")
    assert re.search(r"note: \d+ of 512 tokens of context are used; /undo makes room, /clear", shown)
    assert re.search(r"takes \d+ tokens and the context holds 512", shown)
    assert talk.asked == ["again"]


def test_a_refused_turn_leaves_the_conversation_as_it_was_and_comes_back(talk: Talk) -> None:
    talk.type("one", "y" * 600)
    assert talk.asked == ["one"]
    assert talk.dialogue.unanswered == Question("y" * 600)
    talk.type("/edit", *["\x15" + "two"])  # Ctrl-U clears the line that /edit filled
    assert talk.asked == ["one", "two"]


def test_undo_and_edit_take_the_last_turn_back(talk: Talk) -> None:
    talk.type("one", "two", "/undo")
    assert talk.asked == ["one"]
    assert kept(talk) == [["one"]]
    talk.type("/edit", " and a half")
    assert talk.asked == ["one and a half"]
    talk.type("/undo")
    assert kept(talk) == [], "a conversation without a turn is not kept"


def test_retry_asks_with_another_seed_and_says_if_that_is_in_vain(talk: Talk) -> None:
    shown = talk.type("one", "/retry")
    assert "at temperature 0" in shown
    assert talk.asked == ["one"]
    assert talk.session.sampling.seed == 1
    assert "at temperature 0" not in talk.type("/temp 0.7", "/retry")
    assert talk.session.sampling.seed == 2


def interrupt(monkeypatch: pytest.MonkeyPatch, at: str, nth: int = 1) -> None:
    """Press Ctrl-C when the nth stream says something."""
    stream, calls = Engine.stream, iter(range(1, 100))

    def interrupted(engine: Engine, *arguments: object, **options: object) -> Iterator[object]:
        stops = next(calls) == nth
        for step in stream(engine, *arguments, **options):  # type: ignore[arg-type]
            yield step
            if stops and at in step.text:
                os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Engine, "stream", interrupted)


def test_ctrl_c_stops_the_answer_and_not_the_chat(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(monkeypatch, "answer")
    shown = talk.type("one", "two")
    assert "(stopped)" in shown
    assert [turn["content"] for turn in talk.session.turns] == ["one", "The answer", "two", ANSWER]


def test_ctrl_c_in_the_thinking_takes_the_question_back(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(monkeypatch, "=7")
    shown = talk.type("one", "/retry")
    assert "(stopped; the question was taken back: /edit or /retry)" in shown
    assert [turn["content"] for turn in talk.session.turns] == ["one", ANSWER]


def test_a_retry_that_is_stopped_leaves_the_old_answer(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(monkeypatch, "=7", nth=2)
    talk.type("one", "/retry")
    assert [turn["content"] for turn in talk.session.turns] == ["one", ANSWER]
    assert kept(talk) == [["one"]]


def test_a_file_is_sent_with_the_next_message_alone(talk: Talk, tmp_path: Path) -> None:
    notes = tmp_path / "my notes.txt"
    notes.write_text("a ```fence``` and größe\n")
    shown = talk.type(f"/file {notes}", "what?", "and?")
    assert re.search(r"my notes.txt is attached to the next message, \d+ tokens", shown)
    assert talk.asked == ["my notes.txt:\n````\na ```fence``` and größe\n````\n\nwhat?", "and?"]
    assert next(talk.store.newest_first())[1].title == "what?"
    talk.type("/undo", "/edit", " really")
    assert talk.asked[0].endswith("````\n\nwhat? really"), "the file comes back with its question"
    assert all(set(message) <= {"role", "content", "reasoning_content"} for message in talk.session.messages)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"\x7fELF\0\0", "is binary"),
        ("größe".encode("latin-1"), "is not UTF-8 text"),
        (b"word " * 150, r"takes \d+ tokens and the context has room for \d+"),
        (b"word " * 10_000, "has 50,000 bytes, more than"),
    ],
)
def test_files_that_cannot_be_attached(talk: Talk, tmp_path: Path, data: bytes, said: str) -> None:
    (tmp_path / "f").write_bytes(data)
    assert re.search(said, talk.type(f"/file {tmp_path}/f"))
    assert talk.dialogue.pending == Question("")


def test_another_model_goes_on(talk: Talk, random_gguf: Path, tmp_path: Path) -> None:
    before = talk.session.engine.path
    shown = talk.type("one", "/model", f"/model {random_gguf}", "/stats")
    assert f"{before} (this one)" in shown
    assert "random.gguf, 512 tokens of context, the conversation continues" in shown
    assert talk.session.engine.path == random_gguf
    assert re.search(r"^model +random.gguf, ", shown, re.M)
    assert re.search(r"^context +\d+ of 512 tokens", shown, re.M)


def test_models_of_the_hub_s_cache_are_listed_and_chosen_by_number(
    talk: Talk, random_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--org--name" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    (folder / "cached.gguf").symlink_to(random_gguf)
    (folder / "mmproj-cached.gguf").write_bytes(b"no model")
    shown = talk.type("/model")
    assert "mmproj" not in shown
    number = re.search(r"(\d+)  \S*cached\.gguf", re.sub(r"\n(?!\d)", "", shown))
    assert number
    assert "cached.gguf, 512 tokens of context" in talk.type(f"/model {number[1]}")


def test_what_the_guard_did_is_said_once(talk: Talk) -> None:
    talk.session.guidance = replace(talk.session.guidance, think_budget=2)
    shown = talk.type("one")
    assert shown.count("note: the thinking was") == 1


# --- kept on disk ---


def test_a_conversation_is_kept_after_every_turn_for_its_user_alone(talk: Talk) -> None:
    talk.type("one")
    (path,) = talk.store.folder.iterdir()
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    record = read_conversation(path)
    assert (record.title, record.model, record.turns) == ("one", str(talk.session.engine.path), talk.session.turns)
    assert record.sampling == talk.session.sampling
    talk.type("two", "/clear", "three")
    assert sorted(kept(talk)) == [["one", "two"], ["three"]]


def test_load_lists_and_goes_on_with_one(talk: Talk) -> None:
    talk.type("first", "/clear", "second", "/clear")
    shown = talk.type("/load", "/load 2", "more")
    assert re.search(r" 1  \d{4}-\d\d-\d\d \d\d:\d\d  second\n 2  .*first\n", shown)
    assert f"› first\n{ANSWER}" in shown, "it shows where it stood"
    assert talk.asked == ["first", "more"]
    assert sorted(kept(talk)) == [["first", "more"], ["second"]]


def test_two_chats_do_not_write_over_each_other(talk: Talk) -> None:
    talk.type("one")
    (path,) = talk.store.folder.iterdir()
    other = read_conversation(path)
    talk.store.write(path, replace(other, messages=other.messages + other.messages))
    os.utime(path, ns=(1, 1))  # whatever the clock's resolution
    assert "this one is kept in a file of its own" in talk.type("two")
    assert sorted(kept(talk)) == [["one", "one"], ["one", "two"]]


def test_a_long_conversation_goes_on_without_computing_it_again(
    talk: Talk, scripted_gguf: Path, batches: list[int]
) -> None:
    talk.type("y" * 300)
    (path,) = talk.store.folder.glob("*.json")
    assert path.with_suffix(".state").stat().st_mode & 0o777 == 0o600
    for loads, least, most in ((False, 300, 500), (True, 5, 100)):
        with Engine(scripted_gguf, n_threads=1) as engine:
            assert not loads or talk.store.load_state(path, engine) > 300
            session = Session(engine)
            session.adopt(read_conversation(path))
            batches.clear()
            next(session.ask(Question("more")))
            assert least < sum(batches) < most


def test_a_state_of_another_model_is_deleted(talk: Talk, random_gguf: Path) -> None:
    talk.type("y" * 300)
    (path,) = talk.store.folder.glob("*.json")
    with Engine(random_gguf, n_threads=1) as other:
        assert talk.store.load_state(path, other) == 0
    assert not path.with_suffix(".state").exists()


# --- images ---


def test_images_are_shown_with_every_later_prompt_and_come_back(
    talk: Talk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts: list[tuple[str, list[Path]]] = []
    stream = Engine.stream

    def see(
        engine: Engine, prompt: str, sampling: Sampling, *, guidance: Guidance, images: list[Path]
    ) -> Iterator[Step]:
        prompts.append((prompt, images))
        return stream(engine, prompt, sampling, guidance=guidance)

    monkeypatch.setattr(Engine, "stream", see)
    monkeypatch.setattr(Engine, "sees_images", True)
    cat, dog = tmp_path / "my cat.png", tmp_path / "dog.png"
    for path in (cat, dog):
        path.write_bytes(b"")
    talk.type("/image /no/such.png", f"/image {cat}", f"/image {dog}", "what?", "and?")
    talk.type("/undo", "/edit", "!")
    for prompt, images in prompts:
        assert images == [cat, dog]
        assert f"<|im_start|>user\n{MARKER}\n{MARKER}\nwhat?" in prompt
    assert len(prompts) == 3
    (path,) = talk.store.folder.glob("*.json")
    talk.dialogue.resume(path, read_conversation(path))
    talk.type("/edit", "\x15/file -", "no image")
    assert prompts[-1][1] == []
    assert talk.asked == ["no image"]
