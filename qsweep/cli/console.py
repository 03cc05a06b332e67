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


def say_aside(message: str) -> None:
    """One line on standard error, beside what is asked for."""
    console(stderr=True).print(message, markup=False)


def grid(table: Table, title: str | None = None) -> RichTable:
    """A table of the sweep as rich draws it; on a narrow terminal without the columns that say least."""
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    drawn = RichTable(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    rows = [[column.title for column in table.columns], *table.texts()]
    shown = _that_fit([max(map(len, texts)) for texts in zip(*rows, strict=True)], [c.key for c in table.columns])
    for column in (table.columns[place] for place in shown):
        drawn.add_column(column.title, justify="right" if column.numeric else "left", no_wrap=True)
    for row in rows[1:]:
        drawn.add_row(*(Text(row[place]) for place in shown))
    return drawn


_LEAST_FIRST = ("int8_mac_fraction", "parity_top1", "accuracy_drop_pp", "draws", "engine", "front", "latency_ratio")


def _that_fit(widths: list[int], keys: list[str]) -> list[int]:
    """Places of the columns that the terminal has room for."""
    shown, room = list(range(len(keys))), console().width
    for key in _LEAST_FIRST:
        if sum(widths[place] + 3 for place in shown) > room and key in keys:
            shown.remove(keys.index(key))
    return shown
