"""Commands on what a sweep has found: `front`, `best`."""

from __future__ import annotations

from qsweep.cli.sweep import Sweep


def front(sweep: Sweep) -> None:
    """Print the Pareto front and the baselines."""
    from qsweep.cli.console import console, grid
    from qsweep.cli.sweep import find
    from qsweep.track import front_table

    spec, folder = find(sweep)
    console().print(grid(front_table(folder.records(), spec)))
