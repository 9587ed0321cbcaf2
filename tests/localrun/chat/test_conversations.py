"""Conversations on disk: what is written is read back, what is broken is passed over, what is large is bounded."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest

from deepdistill.errors import ArtifactError
from deepdistill.localrun.chat.conversations import DEFAULT_SAMPLING, Conversation, Store, read_conversation, write_new

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "notes:\n\nWhat\x1b[2J is\nthis?", "typed": "What\x1b[2J is\nthis?"},
    {"role": "assistant", "content": "größe 🦙", "reasoning_content": "a\nb"},
]
FULL = Conversation(
    messages=MESSAGES,
    model="/m.gguf",
    model_hash="ab",
    think="off",
    think_budget=7,
    sampling=replace(DEFAULT_SAMPLING, temperature=0.5, seed=3),
    created="2026-01-02T03:04:05Z",
    updated="2026-01-02T03:04:06Z",
)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    store = Store(tmp_path / "new" / "folder")
    path = store.new_path()
    store.write(path, FULL)
    assert read_conversation(path) == FULL
    assert [(path, FULL)] == list(store.newest_first())
    assert (FULL.system, FULL.turns) == ("Be brief.", MESSAGES[1:])
    assert FULL.title == "What�[2J is this?", "its own words, in one line, without control characters"
    assert [file.name for file in path.parent.iterdir()] == [path.name], "nothing half-written is left"


def test_any_object_with_messages_is_a_conversation(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text(
        json.dumps({"messages": MESSAGES[1:], "think": 7, "sampling": {"temperature": float("nan"), "x": 1}})
    )
    assert read_conversation(path) == Conversation(messages=MESSAGES[1:])


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"messages": 3}',
        '{"messages": [3]}',
        '{"messages": [{"role": "user", "content": 3}]}',
        '{"messages": [{"role": "user", "content": "no answer"}]}',
        '{"messages": [{"role": "user"}, {"role": "assistant"}]}',
        "\ufeff{}",
    ],
)
def test_what_is_none_is_refused_and_passed_over(tmp_path: Path, text: str) -> None:
    store = Store(tmp_path)
    store.write(tmp_path / "good.json", FULL)
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(ArtifactError, check=lambda error: error.code == "conversation-broken"):
        read_conversation(tmp_path / "bad.json")
    assert [path.name for path, _ in store.newest_first()] == ["good.json"]


def test_the_last_one_written_is_the_newest(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for i, name in enumerate(["b", "c", "a"]):
        store.write(tmp_path / f"{name}.json", FULL)
        os.utime(tmp_path / f"{name}.json", (i, i))
    assert [path.stem for path, _ in store.newest_first()] == ["a", "c", "b"]


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = Store(tmp_path / "file" / "conversations")
    with pytest.raises(ArtifactError, check=lambda error: error.code == "folder-unwritable"):
        store.write(store.new_path(), FULL)
    assert list(store.newest_first()) == []


def test_a_new_file_replaces_none(tmp_path: Path) -> None:
    write_new(tmp_path / "a", "mine")
    with pytest.raises(ArtifactError, check=lambda error: error.code == "already-exists"):
        write_new(tmp_path / "a", "yours")
    assert (tmp_path / "a").read_text() == "mine"


def test_states_are_bounded_and_go_with_their_conversation(tmp_path: Path) -> None:
    engine = Mock()
    engine.save_state = lambda path: path.write_bytes(b"x" * 10)
    store = Store(tmp_path, max_state_bytes=25)
    for i, name in enumerate(["old", "mid", "new"]):
        path = tmp_path / f"{name}.json"
        store.write(path, FULL)
        store.save_state(path, engine, n_used=300)
        os.utime(path.with_suffix(".state"), (i + 1, i + 1))
    (tmp_path / "orphan.state").write_bytes(b"")
    store.save_state(tmp_path / "short.json", engine, n_used=20)
    store.save_state(tmp_path / "new.json", engine, n_used=300)
    assert sorted(path.name for path in tmp_path.glob("*.state")) == ["mid.state", "new.state"]
    store.delete(tmp_path / "new.json")
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["mid", "mid", "old"]
