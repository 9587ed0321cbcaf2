"""Markdown while it is written: however it is cut it looks the same, and nothing that was shown is taken back."""

from __future__ import annotations

import io
import re
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from deepdistill.localrun.chat.markdown import Markdown
from deepdistill.localrun.chat.wrap import Flow

STYLES = re.compile(r"\x1b\[[0-9;]*m")
TEXT = r"""# Title with *em*

Some **bold, `code` and *more***, a ~~strike~~, [link](https://x.org/a_(b)) and [1].
`2**3`, 2*3*4 = 24, a ** b, \(x_1\), \[ y \], snake_case, __init__, ~5, 5 * 3.


- one **b**
  - nested item that is long and has to wrap
1. first
> quoted *here* and on and on until it wraps

```python
def f(x: int) -> str:
    return "a" * x
```

| a | b **x** |
|---|:--:|
| 1 | `c` |

---
***both*** **unclosed and *so on
| no table
中文字符很长很长很长很长很长很长。Supercalifragilisticexpialidocious!
-5 degrees, 1.5 apples, [an array, of 1
"""


def drawn(*pieces: str, width: int = 60, **settings: bool) -> str:
    """Return what a terminal gets, styles included."""
    out = io.StringIO()
    flow = Flow(Console(file=out, width=width, force_terminal=True, color_system="standard", **settings))
    markdown = Markdown(flow)
    for piece in pieces:
        markdown.feed(piece)
    markdown.end()
    flow.end()
    return out.getvalue()


def plain(*pieces: str, width: int = 60) -> str:
    return STYLES.sub("", drawn(*pieces, width=width))


@settings(deadline=None, max_examples=30)
@given(cuts=st.lists(st.integers(0, len(TEXT)), max_size=40), width=st.integers(8, 80))
def test_however_it_is_cut_it_looks_the_same(cuts: list[int], width: int) -> None:
    edges = [0, *sorted(cuts), len(TEXT)]
    pieces = [TEXT[a:b] for a, b in pairwise(edges)]
    assert plain(*pieces, width=width) == plain(TEXT, width=width)


@settings(deadline=None, max_examples=30)
@given(text=st.text(alphabet="ab *_`~[]()#>-|1.\n\\", max_size=60), width=st.integers(8, 30))
def test_any_text_letter_by_letter_is_shown_as_at_once_and_loses_no_letter(text: str, width: int) -> None:
    assert plain(*text, width=width) == plain(text, width=width)
    assert sorted(re.findall("[ab]", plain(text, width=width))) == sorted(re.findall("[ab]", text))


def test_nothing_shown_is_taken_back_and_no_line_is_too_long() -> None:
    shown = drawn(*TEXT, width=30)
    assert set(re.findall(r"\x1b\[[^A-Za-z]*[A-Za-z]", shown)) <= set(STYLES.findall(shown)), "styles alone"
    assert "\r" not in shown
    code_apart = re.sub(r"def f.*?\n", "", plain(TEXT, width=30))
    assert max(Console().measure(line).maximum for line in code_apart.splitlines()) <= 30


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("**a** b", "\x1b[1ma\x1b[0m b\n"),
        ("*a b* c", "\x1b[3ma\x1b[0m \x1b[3mb\x1b[0m c\n"),
        ("***a***", "\x1b[1;3ma\x1b[0m\n"),
        ("**a `b`**", "\x1b[1ma\x1b[0m \x1b[1;36mb\x1b[0m\n"),
        ("`` a`b ``", "\x1b[36ma`b\x1b[0m\n"),
        ("~~a~~", "\x1b[9ma\x1b[0m\n"),
        ("## a", "\x1b[1ma\x1b[0m\n"),
        ("[a](b)", "\x1b[4ma\x1b[0m \x1b[2m(b)\x1b[0m\n"),
        ("2*3*4 and 2 * 3 * 4", "2*3*4 and 2 * 3 * 4\n"),
        (r"\(a_1\) \*b\*", "\\(a_1\\) \\*b\\*\n"),
        ("a\nb", "a\nb\n"),
        ("a\n\n\n\nb\n\n", "a\n\nb\n"),
        ("__init__ <b>", "__init__ <b>\n"),
        ("| a", "| a\n"),
    ],
)
def test_what_it_makes_of(text: str, shown: str) -> None:
    assert drawn(*text) == shown


def test_lists_and_quotes_hang() -> None:
    text = "- one two three four\n10. five six seven eight\n> nine ten eleven twelve"
    assert plain(text, width=16).splitlines() == [
        "• one two three",
        "  four",
        "10. five six",
        "    seven eight",
        "▎ nine ten",
        "▎ eleven twelve",
    ]


def test_code_keeps_its_lines_whole_for_copying() -> None:
    line = "x = " + " + ".join("abcdefgh")
    assert plain(f"```\n{line}\n\n  *y*\n```\nz", width=10).splitlines() == ["```", line, "", "  *y*", "```", "z"]


def test_highlighting_knows_the_lines_before() -> None:
    shown = drawn('```python\n"""doc\nclass of its own"""\nclass A: pass\n```')
    string, keyword = (next(line for line in shown.splitlines() if word in line) for word in ("own", "A"))
    assert STYLES.findall(string)[0] != STYLES.findall(keyword)[0]


def test_a_table_fits_a_narrow_window() -> None:
    text = "| name | what |\n|---|---|\n| a | many words that do not fit |\n"
    rows = plain(text, width=20).splitlines()
    assert rows[0].split() == ["name", "what"]
    assert " ".join(" ".join(row[6:].split()) for row in rows[2:]) == "many words that do not fit"


def test_without_colour_code_keeps_its_marks() -> None:
    assert "`a`" in drawn("see `a` there", no_color=True)


def test_a_span_does_not_hold_the_text_for_ever() -> None:
    out = io.StringIO()
    markdown = Markdown(Flow(Console(file=out, width=60, force_terminal=True)))
    markdown.feed("**" + "word " * 20)
    assert out.getvalue() == "", "it may be bold"
    markdown.feed("word " * 60)
    assert out.getvalue().startswith("**word word")
