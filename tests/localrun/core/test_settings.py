"""A tree of settings: what it takes, what it refuses and names, and the file that it writes and reads again."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepdistill.errors import UsageError
from deepdistill.localrun.core.settings import (
    as_toml,
    build,
    changed,
    check,
    fields_of,
    flat,
    read_assignment,
    required,
    setting,
    values_of,
)


def read_size(text: str) -> int:
    if not text.endswith("MB"):
        raise ValueError(f"is {text!r}; write 90MB")
    return int(text[:-2]) * 10**6


@dataclass(frozen=True)
class Inner:
    rank: int = setting(32, "Rank.", min=1)
    targets: tuple[str, ...] = setting((), "Targets.")
    kinds: tuple[Literal["a", "b"], ...] | None = setting(None, "Kinds.")


@dataclass(frozen=True)
class Tree:
    spec: str = required("What to do.", heading="First")
    rate: float | None = setting(None, "A rate.", min=0, max=1)
    mode: Literal["x", "y"] = setting("x", "A mode.")
    size: int | None = setting(None, "A size.", parse=read_size)
    similarity: float | None = setting(0.8, "A filter.")
    file: Path | None = setting(None, "A file.")
    on: bool = setting(False, "A switch.")
    price: tuple[float, float] | None = setting(None, "Two numbers.", min=0)
    text: str = setting('two\nlines with "quotes" and \\', "Some text.")
    inner: Inner = field(default_factory=Inner)


def test_every_leaf_has_its_path_type_and_default() -> None:
    leaves = {leaf.key: leaf for leaf in fields_of(Tree)}
    assert list(leaves)[-3:] == ["inner.rank", "inner.targets", "inner.kinds"]
    assert (leaves["inner.rank"].kind, leaves["inner.rank"].default) == (int, 32)
    assert leaves["rate"].is_optional
    assert not leaves["inner.rank"].is_optional


def test_what_is_given_is_laid_over_the_defaults() -> None:
    tree = build(Tree, {"spec": "s", "inner": {"rank": 4}})
    assert tree == Tree("s", inner=Inner(rank=4))


@pytest.mark.parametrize(
    ("key", "value", "read"),
    [
        ("rate", 1, 1.0),
        ("rate", "none", None),
        ("similarity", "none", None),
        ("similarity", None, None),
        ("size", "90MB", 90_000_000),
        ("size", 5, 5),
        ("file", "a/b", Path("a/b")),
        ("price", "0.5, 2", (0.5, 2.0)),
        ("price", [1, 2], (1.0, 2.0)),
        ("inner.targets", "q_proj,v_proj", ("q_proj", "v_proj")),
        ("inner.targets", ["q_proj"], ("q_proj",)),
        ("inner.kinds", "a,b", ("a", "b")),
        ("inner.kinds", "a", ("a",)),
    ],
)
def test_values_are_read_as_files_and_flags_have_them(key: str, value: Any, read: Any) -> None:
    values: dict[str, Any] = {"spec": "s"}
    *sections, name = key.split(".")
    inside = values
    for section in sections:
        inside = inside.setdefault(section, {})
    inside[name] = value
    tree: Any = build(Tree, values)
    for part in key.split("."):
        tree = getattr(tree, part)
    assert tree == read
    assert type(tree) is type(read)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"rate": 2}, "rate"),
        ({"rate": float("nan")}, "rate"),
        ({"rate": float("inf")}, "rate"),
        ({"rate": True}, "rate"),
        ({"rate": "much"}, "rate"),
        ({"mode": "z"}, "mode"),
        ({"mode": "none"}, "mode"),  # it may not be empty
        ({"size": "90"}, "size"),
        ({"on": 1}, "on"),
        ({"price": [1]}, "price"),
        ({"price": "1,x"}, "price"),
        ({"price": "-1,2"}, "price"),
        ({"inner": {"rank": 0}}, "inner.rank"),
        ({"inner": {"rank": 1.5}}, "inner.rank"),
        ({"inner": {"rank": "8"}}, "inner.rank"),
        ({"inner": {"kinds": ["c"]}}, "inner.kinds"),
        ({"inner": {"targets": [1, {}]}}, "inner.targets"),
        ({"inner": 3}, "inner"),
        ({"innre": {"rank": 3}}, "did you mean inner?"),
        ({"inner": {"rnk": 3}}, "did you mean inner.rank?"),
        ({"rank": 3}, "did you mean inner.rank?"),
    ],
)
def test_what_is_wrong_is_named(values: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, check=lambda error: error.code == "bad-settings") as caught:
        build(Tree, {"spec": "s"} | values)
    assert named in caught.value.message


def test_everything_that_is_wrong_is_named_at_once() -> None:
    with pytest.raises(UsageError) as caught:
        build(Tree, {"rate": 2, "colour": 1, "inner": {"rank": 0, "tragets": []}})
    for name in ("spec (--spec)", "rate", "colour", "inner.rank", "inner.tragets"):
        assert name in caught.value.message


def test_a_tree_made_in_python_is_checked_alike() -> None:
    assert check(Tree("s", rate=0.5)) == Tree("s", rate=0.5)
    with pytest.raises(UsageError, check=lambda error: error.code == "bad-settings"):
        check(Tree("s", inner=Inner(rank=-1)))


def test_a_changed_tree_is_another_one() -> None:
    tree = Tree("s")
    assert changed(tree, {"inner.rank": 8, "on": True}) == Tree("s", on=True, inner=Inner(rank=8))
    assert tree == Tree("s")


@pytest.mark.parametrize("tree", [Tree("s"), Tree('a "b"\n\\', 0.25, "y", 7, None, Path("x"), True, (0.5, 2.0))])
def test_the_file_that_is_written_is_read_again(tree: Tree) -> None:
    assert build(Tree, tomllib.loads(as_toml(tree))) == tree
    assert build(Tree, values_of(tree)) == tree


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_survives_the_file(text: str) -> None:
    assert build(Tree, tomllib.loads(as_toml(Tree("s", text=text)))).text == text


def test_a_file_of_defaults_says_what_has_to_be_given() -> None:
    text = as_toml(Tree)
    assert "# spec = " in text
    assert build(Tree, tomllib.loads(text) | {"spec": "s"}) == Tree("s")


@pytest.mark.parametrize(
    ("text", "path", "value"),
    [
        ("inner.rank=64", ("inner", "rank"), 64),
        ("rate = 0.5", ("rate",), 0.5),
        ("on=true", ("on",), True),
        ("price=[1, 2]", ("price",), [1, 2]),
        ("spec=a=b", ("spec",), "a=b"),
        ("file=runs/x y", ("file",), "runs/x y"),
        ("inner.rank-x=1", ("inner", "rank_x"), 1),
    ],
)
def test_an_assignment_has_a_path_and_a_value(text: str, path: tuple[str, ...], value: Any) -> None:
    assert read_assignment(text) == (path, value)


@pytest.mark.parametrize("text", ["", "rate", "=1"])
def test_what_is_no_assignment_is_refused(text: str) -> None:
    with pytest.raises(UsageError, check=lambda error: error.code == "bad-assignment"):
        read_assignment(text)


def test_nested_values_are_told_by_their_paths() -> None:
    assert dict(flat({"a": 1, "b": {"c": {"d": 2}}, "e": {}})) == {("a",): 1, ("b", "c", "d"): 2}
