"""Commands on what a sweep has found: `front`, `best`."""

from __future__ import annotations

from qsweep.cli.sweep import By, Maxima, Minima, Sweep, Trial


def front(sweep: Sweep) -> None:
    """Print the Pareto front and the baselines."""
    from qsweep.cli.console import console, grid, say
    from qsweep.cli.sweep import find
    from qsweep.study.notes import notes
    from qsweep.track import front_table

    spec, folder = find(sweep)
    records = folder.records()
    console().print(grid(front_table(records, spec)))
    say(*(f"note: {note}" for note in notes(spec, folder, records)))


def best(sweep: Sweep, maxima: Maxima = None, minima: Minima = None, by: By = "accuracy", trial: Trial = None) -> None:
    """Print the trial to ship: the best by one metric among those that keep all bounds, with its config."""
    import yaml

    from qsweep.cli.console import say
    from qsweep.cli.sweep import choose
    from qsweep.records import Metrics
    from qsweep.tasks import ACCURACY
    from qsweep.track.table import Column, mixed_bits, place_text

    record, spec, folder = choose(sweep, maxima, minima, by, trial)
    say(f"#{record.number} {record.name} on {place_text(record)}")
    judged_by = spec.task.judged_by
    if judged_by != ACCURACY:
        say(f"  {'accuracy is':<22} {Column('accuracy', judged_by).title}, its drop is in that, too")
    for name in Metrics.model_fields:
        value = getattr(record.metrics, name)
        if value is not None:
            say(f"  {name:<22} {value:,.6g}")
    say(f"  {'artifact':<22} {folder.path / record.folder / 'artifact'}", "")
    if bits := mixed_bits(record):
        say(f"  {'layers':<22} {bits}", "")
    say(yaml.safe_dump(record.config, sort_keys=False).rstrip())
