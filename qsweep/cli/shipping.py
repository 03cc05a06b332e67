"""Commands that ship a trial: `promote`, `export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qsweep.cli.sweep import By, Maxima, Minima, Sweep, Trial

Name = Annotated[str, typer.Option("--name", help="The registered model of MLflow; made where there is none.")]
Alias = Annotated[
    str, typer.Option("--alias", help="What the new version is called; it moves from the version before.")
]
_LARGER = 1.05
"""Times what `promote` ships, from which on an export says so."""
Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="A folder that does not exist yet.")]


Source = Annotated[
    Path,
    typer.Argument(metavar="SWEEP", help="The sweep: the path of its spec, or its folder; or a bundle of `compress`."),
]


def promote(
    sweep: Source,
    name: Name,
    maxima: Maxima = None,
    minima: Minima = None,
    by: By = "accuracy",
    trial: Trial = None,
    alias: Alias = "champion",
) -> None:
    """Register the chosen trial's bundle with MLflow, as a new version of a model."""
    from qsweep.cli.console import say
    from qsweep.cli.sweep import find
    from qsweep.ship import Selector
    from qsweep.ship import promote as register
    from qsweep.spec import UNCOMPRESSED
    from qsweep.track.bundle import MANIFEST
    from qsweep.track.table import place_text

    task, folder = None, sweep
    if not (sweep / MANIFEST).is_file():
        spec, found = find(sweep)
        task, folder = spec.task, found.path
    made = register(folder, Selector.parse(maxima or (), minima or (), by, trial, task), name, alias)
    told = f"{made.record.name} on {place_text(made.record)}"
    say(f"{told} is version {made.version} of `{made.name}`, alias `{made.alias}`")
    if made.record.name == UNCOMPRESSED and trial is None:
        say("note: this is the model as it is, which nothing compressed is better than by what was asked")
    say(f"  qsweep.load({made.uri!r}, uri={made.tracking_uri!r})")


def export(
    sweep: Sweep,
    out: Out,
    maxima: Maxima = None,
    minima: Minima = None,
    by: By = "accuracy",
    trial: Trial = None,
) -> None:
    """Write the chosen trial's artifact as its runtime takes it alone, without qsweep."""
    from qsweep.cli.console import say
    from qsweep.cli.sweep import choose
    from qsweep.ship import export as write
    from qsweep.spec import TrialConfig
    from qsweep.track.table import place_text

    record, _, folder = choose(sweep, maxima, minima, by, trial)
    made = write(record, folder.path, out)
    files = sorted(path for path in made.rglob("*") if path.is_file())
    say(f"{record.name} on {place_text(record)}:", *(f"  {path}  {path.stat().st_size:,} bytes" for path in files))
    total, packed = sum(path.stat().st_size for path in files), record.metrics.size_bytes
    if packed is not None and total > _LARGER * packed:
        say(f"note: these are {total:,} bytes for the runtime alone; `promote` ships the same in {packed:,.0f}, packed")
    if note := TrialConfig.model_validate(record.config).target.export_note:
        say(f"note: {note}")
