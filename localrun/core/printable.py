"""Text that is not ours, made safe for a terminal, and how it is written there.

A model, a server or a file may send what a terminal obeys. Without control characters it cannot steer the terminal;
without bidirectional overrides it cannot show other text than it holds.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.segment import Segment
    from rich.table import Table
    from rich.text import Text

_CONTROL = {code: None for code in [*range(32), *range(127, 160)] if chr(code) not in "\n\t"}
_BIDIRECTIONAL = dict.fromkeys([*range(0x202A, 0x202F), *range(0x2066, 0x206A)])
_REMOVED = _CONTROL | _BIDIRECTIONAL


def printable(text: str) -> str:
    """Return foreign text without what could steer a terminal; newlines stay, tabs become spaces."""
    return text.translate(_REMOVED).expandtabs(4)


def new_console(*, stderr: bool = False) -> Console:
    """Return this terminal's console: no text is markup to it, and of no text a terminal obeys anything.

    `[/b]` and `:smile:` may be anybody's. On a dumb terminal rich assumes 80 columns, so it is told the width.
    """
    from rich.console import Console, ConsoleDimensions

    class Safe(Console):
        def render(self, *given: Any, **options: Any) -> Iterator[Segment]:
            for segment in super().render(*given, **options):
                yield segment if segment.control else segment._replace(text=printable(segment.text))

    console = Safe(stderr=stderr, markup=False, emoji=False, highlight=False)
    if console.is_dumb_terminal:
        size = shutil.get_terminal_size()
        console.size = ConsoleDimensions(size.columns, size.lines)
    return console


def facts_table(facts: Iterable[tuple[str, str | Text]], style: str = "dim") -> Table:
    """Return names, in a style, and beside each what there is to know of it."""
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, style=style)
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(Text(name), Text(printable(value)) if isinstance(value, str) else value)
    return table
