"""A sweep from its spec to the last published record: what the command line, a notebook and a test consume alike."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

from qsweep.records import Record
from qsweep.spec import load_spec


def run(spec: str | Path) -> Generator[Record, None, bool]:
    """Run the sweep of the spec file, or go on with it, and publish it to MLflow.

    Yields records as `qsweep.study.driver.run` does: those of earlier runs first, then each as soon as it is durable; a
    record replaces an earlier one of its number. Returns whether the sweep has finished; after SIGINT it has not.
    Raises SpecError, SweepError, DiskFull, TaskChanged, and what keeps the task or the fp32 baseline from working.
    """
    from qsweep.study.driver import run as drive
    from qsweep.track import publish

    asked, root = load_spec(spec), Path(spec).parent.resolve()
    return (yield from publish(drive(asked, root), asked, root))
