r"""Show Markdown as it streams: each word once, in its final style and place, and never redrawn.

Redrawing an unfinished block fails once its first lines have scrolled away or the window is resized, and it flickers
over a slow connection. So a word is shown as soon as no later character can change it. An emphasis, a code span or a
link waits for its end, up to a limit; the first characters of a line wait until their meaning is clear; a line of code
waits for its end, and a table for its last row.

The grammar is CommonMark's as models use it. Nothing else is lost: a newline stays a newline, backslashes stay (`\(x\)`
is mathematics), `2*3*4` is a product, `__init__` a name, and HTML is text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.text import Text

if TYPE_CHECKING:
    from rich.syntax import Syntax

    from .wrap import Flow

_MAX_HELD = 240  # characters that a span may wait for its end

_SPAN = re.compile(
    r"(?<!`)(?P<ticks>`+)(?!`)(?P<code>.+?)(?<!`)(?P=ticks)(?!`)"
    r"|(?<![\w*\\])\*\*\*(?P<both>[^\s*](?:.*?[^\s*])??)\*\*\*(?![\w*])"
    r"|(?<![\w*\\])\*\*(?P<strong>[^\s*](?:.*?[^\s])??)\*\*(?![\w*])"
    r"|(?<![\w*\\])\*(?P<em>[^\s*](?:[^*]*?[^\s*])??)\*(?![\w*])"
    r"|(?<![\w\\])_(?P<em_>[^\s_](?:[^_]*?[^\s_])??)_(?!\w)"
    r"|~~(?P<strike>[^\s~](?:.*?[^\s~])??)~~"
    r"|(?<!\\)!?\[(?P<label>[^\[\]]*)\]\((?P<url>[^\s()]*(?:\([^\s()]*\)[^\s()]*)*)\)"
)
_STYLES = {"both": "bold italic", "strong": "bold", "em": "italic", "em_": "italic", "strike": "strike"}
# What may begin a span that has not ended yet.
_OPENER = re.compile(
    r"`|(?<![\w*\\])\*{1,3}(?=[^\s*]|$)|(?<![\w\\])_(?=[^\s_]|$)|~~(?=[^\s~]|$)|~$"
    r"|(?<!\\)!?\[[^\[\]]*(?:\](?:\((?:[^()]|\([^()]*\)?)*)?)?$"
)

# The beginning of a line, as far as it may yet become a heading, a list item, a quote, a fence, a rule or a table.
_UNDECIDED = re.compile(r"\s*(?:>\s*)*(?:#{0,6}|[-*+_\s]*|\d{0,9}[.)]?|`{1,2}|~{1,2}|(?:`{3,}|~{3,}|\|).*)")
_QUOTE = re.compile(r"\s{0,3}((?:> ?)+)")
_FENCE = re.compile(r"\s*(`{3,}|~{3,})\s*([\w+#.-]*)[^`]*")
_HEADING = re.compile(r"\s{0,3}(#{1,6})\s+")
_ITEM = re.compile(r"(\s*)([-*+]|\d{1,9}[.)])\s+")
_RULE = re.compile(r"\s{0,3}(?:(?:-\s*){3,}|(?:\*\s*){3,}|(?:_\s*){3,})")
_DELIMITERS = re.compile(r"\s*\|?\s*:?-+:?\s*(?:\|\s*:?-+:?\s*)*\|?\s*")


class Markdown:
    """Writes Markdown to a flow of words as it comes in."""

    def __init__(self, flow: Flow) -> None:
        self._flow = flow
        self._held = ""
        self._in_line = False  # the line's marker has been written
        self._style, self._before = "", ""  # the current line's style, and the character before the held text
        self._is_parted = False  # a blank line comes first
        self._code: _Code | None = None
        self._rows: list[str] = []

    @property
    def n_rows(self) -> int:
        """How many rows of an unfinished table are held."""
        return len(self._rows)

    def feed(self, text: str) -> None:
        """Write all that no later text can change."""
        self._held += text
        while "\n" in self._held:
            line, _, self._held = self._held.partition("\n")
            self._end_line(line)
        if self._held:
            self._write_settled()

    def end(self) -> None:
        """Write what was held back, at the end of the answer."""
        if self._held or self._in_line:
            self.feed("\n")
        self._put_table()
        self._code, self._is_parted = None, False

    def _end_line(self, line: str) -> None:
        """Write the rest of a line that is complete."""
        if not self._in_line:
            if self._take_block_line(line):
                return
            line = self._begin_line(line)
        self._put(line)
        self._flow.newline()
        self._in_line = False

    def _write_settled(self) -> None:
        """Write the part of the current line that no later text can change."""
        if not self._in_line:
            if self._code or _UNDECIDED.fullmatch(self._held):
                return
            self._put_table()
            self._held = self._begin_line(self._held)
        n = _n_settled(self._held, self._before)
        self._put(self._held[:n])
        self._held = self._held[n:]

    def _take_block_line(self, line: str) -> bool:
        """Write or hold a line that is not plain text; return False if it is plain text."""
        if self._code:
            ends = self._code.is_end(line)
            self._flow.line(Text(line, "dim") if ends else self._code.add(line))
            self._code = None if ends else self._code
            return True
        if line.lstrip().startswith("|"):
            self._rows.append(line)
            return True
        self._put_table()
        if not line.strip():
            self._is_parted = True
        elif fence := _FENCE.fullmatch(line):
            self._code = _Code(fence[1], fence[2])
            self._begin("")
            self._flow.line(Text(line, "dim"))
        elif _RULE.fullmatch(line):
            self._begin("")
            self._flow.line(Text("─" * max(3, min(40, self._flow.console.width - 1)), "dim"))
        else:
            return False
        return True

    def _begin_line(self, line: str) -> str:
        """Write a line's marker; return the text after it."""
        self._in_line, self._style, self._before = True, "", ""
        margin = ""
        if quote := _QUOTE.match(line):
            margin, line = "▎ " * quote[1].count(">"), line[quote.end() :]
        if heading := _HEADING.match(line):
            self._style = "bold underline" if heading[1] == "#" else "bold"
            self._begin(margin)
            return line[heading.end() :]
        if item := _ITEM.match(line):
            self._begin(margin + item[1] + ("• " if item[2] in "-*+" else f"{item[2]} "), margin)
            return line[item.end() :]
        text = line.lstrip()
        self._begin(margin + line[: len(line) - len(text)])
        return text

    def _begin(self, first: str, rest: str | None = None) -> None:
        """Begin a line with a margin; the rows that it wraps into are indented as far."""
        if self._is_parted:
            self._flow.begin("", "")
            self._flow.newline()
        self._is_parted = False
        self._flow.begin(first, first if rest is None else rest.ljust(len(first)))

    def _put(self, text: str) -> None:
        for piece, style in _spans(text, self._style, before=self._before, keep_ticks=self._flow.console.no_color):
            self._flow.write(piece, style)
        self._before = text[-1:] or self._before

    def _put_table(self) -> None:
        """Write the held rows, as plain lines if they are not a table."""
        rows, self._rows = self._rows, []
        if len(rows) >= 2 and _DELIMITERS.fullmatch(rows[1]):
            self._begin("")
            self._flow.table([_cells(row) for row in rows[:1] + rows[2:]])
            return
        for row in rows:
            self._begin_line(row)
            self._put(row)
            self._flow.newline()
            self._in_line = False


def _n_settled(text: str, before: str) -> int:
    """Return how many characters of an unfinished line are final."""
    line, start = before + text, len(before)
    for span in _SPAN.finditer(line, start):
        if (opener := _waiting(line, start, span.start())) is not None:
            return opener - len(before)
        if span.end() == len(line):  # the next character may change its meaning
            return span.start() - len(before)
        start = span.end()
    opener = _waiting(line, start, len(line))
    return (len(line) if opener is None else opener) - len(before)


def _waiting(line: str, start: int, end: int) -> int | None:
    """Return where an unfinished span may begin."""
    openers = (found.start() for found in _OPENER.finditer(line, start, end))
    return next((at for at in openers if len(line) - at <= _MAX_HELD), None)


def _spans(text: str, style: str, *, before: str = "", keep_ticks: bool = False) -> Iterator[tuple[str, str]]:
    """Yield (text, style) for a piece of a line; `before` is the character before it."""
    line, start = before + text, len(before)
    for span in _SPAN.finditer(line, start):
        yield line[start : span.start()], style
        start = span.end()
        if span["code"]:
            yield (span[0] if keep_ticks else _unpadded(span["code"])), f"{style} cyan"
        elif span["url"] is not None:
            yield span["label"], f"{style} underline"
            yield f" ({span['url']})" if span["url"] != span["label"] else "", "dim"
        else:
            kind = next(name for name in _STYLES if span[name])
            yield from _spans(span[kind], f"{style} {_STYLES[kind]}", keep_ticks=keep_ticks)
    yield line[start:], style


def _unpadded(code: str) -> str:
    """Return a code span without the spaces that separate it from backticks in it."""
    return code[1:-1] if code[0] == code[-1] == " " and code.strip() else code


def _cells(row: str) -> list[Text]:
    inner = row.strip().removeprefix("|").removesuffix("|")
    return [Text.assemble(*_spans(cell.strip().replace("\\|", "|"), "")) for cell in re.split(r"(?<!\\)\|", inner)]


class _Code:
    """An unfinished block of code."""

    def __init__(self, fence: str, language: str) -> None:
        self._fence, self._text = fence, ""
        self._syntax: Syntax | None = None
        if language:
            from rich.syntax import Syntax

            self._syntax = Syntax("", language, theme="ansi_dark")

    def is_end(self, line: str) -> bool:
        """Return whether a line closes the block."""
        return len(mark := line.strip()) >= len(self._fence) and set(mark) == {self._fence[0]}

    def add(self, line: str) -> Text:
        """Return a line, highlighted in the context of the lines before it."""
        if self._syntax is None:
            return Text(line)
        self._text += line + "\n"
        highlighted = self._syntax.highlight(self._text).split("\n", allow_blank=True)
        return highlighted[self._text.count("\n") - 1]
