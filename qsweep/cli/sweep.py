"""A sweep as commands name it: the path of its spec, or its folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from qsweep.records import Record
    from qsweep.spec import Spec
    from qsweep.study.folder import SweepFolder

Sweep = Annotated[Path, typer.Argument(metavar="SWEEP", help="The sweep: the path of its spec, or its folder.")]
Maxima = Annotated[
    list[str] | None, typer.Option("--max", metavar="METRIC=VALUE", help="Upper bound of a metric; repeat for more.")
]
Minima = Annotated[
    list[str] | None, typer.Option("--min", metavar="METRIC=VALUE", help="Lower bound of a metric; repeat for more.")
]
By = Annotated[str, typer.Option("--by", metavar="METRIC", help="The metric that decides, best first.")]
Trial = Annotated[int | None, typer.Option("--trial", metavar="NUMBER", help="This trial, whatever bounds it breaks.")]


def find(path: Path) -> tuple[Spec, SweepFolder]:
    """The spec that the sweep at `path` was run with, and its folder; says so where `path` is another by now. Raises
    SweepError where there is none."""
    from qsweep.cli.console import say_aside
    from qsweep.errors import SweepError
    from qsweep.spec import load_spec
    from qsweep.study.folder import SweepFolder

    if not path.is_dir():
        asked = load_spec(path)
        folder = SweepFolder(path.parent, asked.name)
        if not folder.is_of(asked):
            say_aside(f"note: `{path}` has changed since; this is the sweep as it was run")
    elif (path / "spec.json").is_file():
        folder = SweepFolder.at(path)
    else:
        raise SweepError(f"`{path}`: there is no sweep here; it must be the path of a spec, or a folder `sweeps/NAME`")
    return folder.spec(), folder


def choose(
    path: Path, maxima: list[str] | None, minima: list[str] | None, by: str, trial: int | None
) -> tuple[Record, Spec, SweepFolder]:
    """The trial of the sweep at `path` that the options select, and what `find` gives. Raises SpecError, SweepError."""
    from qsweep.ship import Selector, best

    spec, folder = find(path)
    selector = Selector.parse(maxima or (), minima or (), by, trial, spec.task)
    return best(folder.records(), selector, spec), spec, folder
