"""The record log: what was appended comes back as it was, and a line of another shape is named with its fault."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from deepdistill.errors import ArtifactError
from deepdistill.localrun.core.record_log import RecordLog, from_json, read_records, to_json


@dataclass(frozen=True)
class Place:
    name: str
    height_m: float = 0.0


@dataclass(frozen=True)
class Visit:
    id: str
    count: int
    mood: Literal["good", "bad"]
    place: Place
    turns: list[dict[str, str]] = field(default_factory=list)
    note: str | None = None
    next_place: Place | None = None
    marks: tuple[int, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)
    is_paid: bool = False


VISIT = Visit("a", 3, "good", Place("hut", 1200.5), [{"role": "user"}], "naïve", Place("top", 2), (1, 2), {"x": [1]})
RECORD = json.loads(to_json(VISIT))


def test_a_record_and_back() -> None:
    assert from_json(Visit, to_json(VISIT)) == VISIT
    assert from_json(Visit, json.dumps({"id": "a", "count": 1, "mood": "bad", "place": {"name": "hut"}})) == Visit(
        "a", 1, "bad", Place("hut")
    )


def test_fields_of_a_newer_version_are_left_out_at_every_depth() -> None:
    newer = RECORD | {"later": 1, "place": RECORD["place"] | {"later": 2}}
    assert from_json(Visit, json.dumps(newer)) == VISIT


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"id": 3}, "id: 3 is not str"),
        ({"count": 1.5}, "count: 1.5 is not int"),
        ({"count": True}, "count: True is not int"),
        ({"mood": "so"}, "mood: 'so' is not one of good, bad"),
        ({"mood": []}, "mood: [] is not one of good, bad"),
        ({"place": "hut"}, "place: not a JSON object"),
        ({"place": {"height_m": 1.0}}, "place: not a place: it has no name"),
        ({"place": {"name": "hut", "height_m": "high"}}, "place: height_m: 'high' is not float or int"),
        ({"turns": {}}, "turns: {} is not a list"),
        ({"turns": [{"role": 1}]}, "turns: 1 is not str"),
        ({"turns": ["hello"]}, "turns: 'hello' is not an object"),
        ({"note": 1}, "note: 1 is not"),
        ({"next_place": 7}, "next_place: "),
        ({"marks": [1, "x" * 100]}, "marks: 'xxx"),
        ({"extra": []}, "extra: [] is not an object"),
        ({"is_paid": 1}, "is_paid: 1 is not bool"),
    ],
)
def test_a_value_of_another_type_is_named(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, check=lambda error: str(error).startswith(named) and len(str(error)) < 120):
        from_json(Visit, json.dumps(RECORD | change))


@pytest.mark.parametrize("line", ["", "{", "[]", "3", "null", '{"id": "a"}', "[" * 100_000, '{"count": 1' + "0" * 9999])
def test_what_is_no_record_is_refused(line: str) -> None:
    with pytest.raises(ValueError, check=lambda error: "\n" not in str(error)):
        from_json(Visit, line)


def test_a_log_grows_and_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "places.jsonl"
    with RecordLog(path, Place) as log:
        log.append(Place("a", 1))
        log.extend(Place(f"b{i}") for i in range(2500))
        assert len(list(log)) == 2501
        assert log.size == path.stat().st_size
        log.sync()
    with RecordLog(path, Place) as log:
        assert log.n_cut_bytes == 0
        log.append(Place("half a pair \ud83d"))
    places = list(read_records(path, Place))
    assert [place.name for place in places[:2]] == ["a", "b0"]
    assert (places[-1].name, len(places)) == ("half a pair \ud83d", 2502)


def test_a_torn_last_line_is_left_out_and_cut_off_by_the_next_writer(tmp_path: Path) -> None:
    path = tmp_path / "places.jsonl"
    whole = (to_json(Place("naïve")) + "\n").encode()
    for cut in range(1, len(whole)):
        path.write_bytes(whole + whole[:cut])
        assert list(read_records(path, Place)) == [Place("naïve")]
        assert path.stat().st_size == len(whole) + cut
        with RecordLog(path, Place) as log:
            assert log.n_cut_bytes == cut
        assert path.read_bytes() == whole


def test_a_broken_line_is_named_or_left_out(tmp_path: Path) -> None:
    path = tmp_path / "places.jsonl"
    path.write_text('{"name": "a"}\n{"name": 1}\n{"name": "c"}\n', encoding="utf-8")
    with pytest.raises(ArtifactError, check=lambda error: error.code == "line-broken") as caught:
        list(read_records(path, Place))
    assert f"{path}:2" in caught.value.message
    assert [place.name for place in read_records(path, Place, skip_broken=True)] == ["a", "c"]


def test_a_missing_file(tmp_path: Path) -> None:
    assert list(read_records(tmp_path / "none.jsonl", Place, missing_ok=True)) == []
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(ArtifactError, check=lambda error: error.code == "file-unreadable"):
            list(read_records(path, Place))
    with pytest.raises(ArtifactError, check=lambda error: error.code == "write-failed"):
        RecordLog(tmp_path, Place)
