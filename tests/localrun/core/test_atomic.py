"""Written whole or not at all, under a name that nobody else knows."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from deepdistill.errors import ArtifactError
from deepdistill.localrun.core.atomic import replacing_file, replacing_folder, write_text


def test_a_file_is_replaced_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    with replacing_file(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), replacing_file(path) as temporary:
        raise ZeroDivisionError(temporary.write_text("half"))
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.name == "nt", reason="links take rights there")
def test_links_that_wait_beside_the_place_are_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    for name in (".a.json.partial", ".a.json.part", f".a.json.{os.getpid()}.part"):
        (tmp_path / name).symlink_to(victim)
    write_text(tmp_path / "a.json", "new")
    assert victim.read_text() == "mine"
    assert (tmp_path / "a.json").read_text() == "new"


@pytest.mark.skipif(os.name == "nt", reason="modes are POSIX's")
def test_files_get_the_usual_rights(tmp_path: Path) -> None:
    mask = os.umask(0o022)
    try:
        write_text(tmp_path / "a", "text")
        with replacing_folder(tmp_path / "b") as folder:
            (folder / "c").write_text("")
    finally:
        os.umask(mask)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o644
    assert (tmp_path / "b").stat().st_mode & 0o777 == 0o755


def test_a_private_file_is_private_from_its_first_byte(tmp_path: Path) -> None:
    with replacing_file(tmp_path / "a", mode=0o600) as temporary:
        assert temporary.stat().st_mode & 0o777 == 0o600
    write_text(tmp_path / "b", "mine", mode=0o600)
    assert [path.stat().st_mode & 0o777 for path in sorted(tmp_path.iterdir())] == [0o600, 0o600]


def test_a_folder_is_there_whole(tmp_path: Path) -> None:
    place = tmp_path / "model"
    with pytest.raises(ZeroDivisionError), replacing_folder(place) as folder:
        raise ZeroDivisionError((folder / "config.json").write_text("{}"))
    assert list(tmp_path.iterdir()) == []
    with replacing_folder(place) as folder:
        (folder / "config.json").write_text("{}")
    assert [path.name for path in place.iterdir()] == ["config.json"]


def test_a_full_disk_is_an_error_with_the_file_in_it(tmp_path: Path) -> None:
    with (
        pytest.raises(ArtifactError, check=lambda error: error.code == "write-failed") as caught,
        replacing_file(tmp_path / "a"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert str(tmp_path / "a") in caught.value.message
    with pytest.raises(ArtifactError, check=lambda error: error.code == "write-failed"):
        write_text(tmp_path / "missing" / "a", "text")


def test_an_error_about_another_file_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), replacing_file(tmp_path / "a"):
        (tmp_path / "missing").read_text()
