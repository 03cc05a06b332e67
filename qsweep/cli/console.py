"""What the commands print with."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table as RichTable

    from qsweep.track import Table


def console(stderr: bool = False) -> Console:
    """Standard output (or error). Where it is not a terminal nothing is coloured, wrapped or cut."""
    import sys

    from rich.console import Console

    terminal = (sys.stderr if stderr else sys.stdout).isatty()
    return Console(stderr=stderr, highlight=False, soft_wrap=True, width=None if terminal else 10_000)


def say(*lines: str) -> None:
    """Lines on standard output, as they are."""
    out = console()
    for line in lines:
        out.print(line, markup=False)


def say_error(message: str) -> None:
    """One red line on standard error."""
    from rich.text import Text

    console(stderr=True).print(Text.assemble(("error: ", "bold red"), (" ".join(message.split()), "red")))


def grid(table: Table, title: str | None = None) -> RichTable:
    """A table of the sweep as rich draws it."""
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    drawn = RichTable(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in table.columns:
        drawn.add_column(column.title, justify="right" if column.numeric else "left", no_wrap=True)
    for row in table.texts():
        drawn.add_row(*map(Text, row))
    return drawn
