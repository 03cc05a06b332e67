"""`qsweep run`."""

from __future__ import annotations

import shlex
import sys
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from qsweep.cli.specs import SpecPath

if TYPE_CHECKING:
    from rich.console import RenderableType

    from qsweep.records import Record
    from qsweep.spec import Spec
    from qsweep.study.folder import SweepFolder
    from qsweep.tasks import TaskMetric

SHOWN = {
    "size_bytes": "{:,.0f} bytes",
    "latency_ms": "{:.3g} ms",
    "latency_ratio": "{:.2f} of fp32",
}
"""What the line of a finished trial tells beside its accuracy."""

WAIT_SECONDS = 30.0
"""How long a measurement of another sweep is waited for before a log says so."""


def run(spec: SpecPath) -> None:
    """Run the sweep of a spec, or go on with one that was stopped. Ctrl-C stops it in order."""
    from qsweep.spec import load_spec
    from qsweep.study.folder import SweepFolder
    from qsweep.sweep import run as sweep

    asked = load_spec(spec)
    watch = Watch(asked, SweepFolder(spec.parent, asked.name), spec)
    finished = watch.follow(sweep(spec))
    watch.conclude(finished)
    if not finished:
        raise typer.Exit(130)


class Watch:
    """What the person sees of a sweep that runs: live where there is a terminal, else a line a record."""

    def __init__(self, spec: Spec, folder: SweepFolder, path: Path) -> None:
        from qsweep.track.table import several_sizes

        self.spec, self.folder, self.path = spec, folder, path
        self.records = {record.number: record for record in folder.records()}
        self.before = len(self.records)
        self.start = time.monotonic()
        self.sized = several_sizes(spec)

    def follow(self, records: Generator[Record, None, bool]) -> bool:
        """Show the records as they come; whether the sweep has finished."""
        with self._live():
            while True:
                try:
                    record = next(records)
                except StopIteration as end:
                    return bool(end.value)
                self._tell(record)
                self.records[record.number] = record

    def _tell(self, record: Record) -> None:
        from qsweep.cli.console import say
        from qsweep.study.notes import early

        if self.before:  # said with the first record: only then has the driver taken the sweep for its own
            say(f"going on with `{self.folder.path}`: {self.before} records are there")
            self.before = 0
        if sys.stdout.isatty():
            return
        known = self.records.get(record.number)
        if known is None:
            say(self._line(record))
            if record.number == 0:  # there is time left to stop
                say(*(f"note: {note}" for note in early(self.spec, self.folder, record)))
        elif record.repetitions != known.repetitions:
            say(again(record, self.spec.task.judged_by, self.sized))

    def _line(self, record: Record) -> str:
        return line(record, self.spec.task.judged_by, self.sized)

    @contextmanager
    def _live(self) -> Iterator[None]:
        """What is to be seen beside the records, for as long as it lasts."""
        if sys.stdout.isatty():
            from rich.live import Live

            with Live(get_renderable=self._now, refresh_per_second=2, transient=True):
                yield
            return
        over = threading.Event()
        threading.Thread(target=self._say_waits, args=(over,), daemon=True).start()
        try:
            yield
        finally:
            over.set()

    def _say_waits(self, over: threading.Event) -> None:
        """Say once of each measurement of another sweep that it is waited for, until `over`."""
        from qsweep.cli.console import say

        before = said = None
        while not over.wait(WAIT_SECONDS):
            now = self.folder.waits()
            if now is not None and now == before and now != said:
                say(f"paused while {now} measures on this machine")
                said = now
            before = now

    def _now(self) -> RenderableType:
        from rich.console import Group
        from rich.text import Text

        from qsweep.cli.console import grid
        from qsweep.study.notes import early
        from qsweep.track import front_table

        records = list(self.records.values())
        trials = sum(record.kind == "trial" for record in records)
        lines = [Text(f"{trials} of {self.spec.search.trials} trials", style="bold")]
        if (other := self.folder.waits()) is not None:
            lines.append(Text(f"  paused while {other} measures on this machine"))
        lines += [Text(f"  {_place(live.number)}{live.job}: {live.progress}") for live in self.folder.live()]
        lines += [Text(f"note: {note}") for note in early(self.spec, self.folder, self.records.get(0))]
        return Group(*lines, grid(front_table(records, self.spec)))

    def conclude(self, finished: bool) -> None:
        """The front, what failed, and where to look next."""
        from qsweep.cli.console import console, grid, say
        from qsweep.study.notes import notes
        from qsweep.track import front_table

        records = [record for _, record in sorted(self.records.items())]
        console().print(grid(front_table(records, self.spec)))
        say(*(f"note: {note}" for note in notes(self.spec, self.folder, records)))
        if sys.stdout.isatty():  # else each has had its line
            say(*(self._line(record) for record in records if record.state != "complete"))
        if not finished:
            say(f"stopped; `qsweep run {shlex.quote(str(self.path))}` goes on")
            return
        say(*self._ended_early(), "What next:", *self._next())

    def _ended_early(self) -> list[str]:
        from qsweep.study.points import enumerated

        search, trials = self.spec.search, [r for r in self.records.values() if r.kind == "trial"]
        done = sum(record.evaluated for record in trials)
        if done >= search.trials:
            return []
        if search.timeout is not None and time.monotonic() - self.start >= search.timeout:
            return [f"`search.timeout` ended the search after {done} of {search.trials} trials; `qsweep run` goes on"]
        if enumerated(self.spec):
            return []
        return [
            f"the search ended after {done} of {search.trials} trials: no config was found that is new and possible"
        ]

    def _next(self) -> list[str]:
        from qsweep.track import pareto_url, report_url

        sweep, served = shlex.quote(str(self.path)), pareto_url(self.folder.path)
        where = None if served else "http://127.0.0.1:5000"  # what `qsweep ui` serves
        page, report = pareto_url(self.folder.path, where), report_url(self.folder.path, where)
        return [
            *self._to_ship(sweep),
            f"  MLflow: {served}" if served else f"  qsweep ui {sweep}      then {page or 'the page it prints'}",
            *([f"  report: {report}"] if report else []),
        ]

    def _to_ship(self, sweep: str) -> list[str]:
        """The commands that ship a trial, or why they would find none."""
        from qsweep.errors import SweepError
        from qsweep.ship import Selector, best
        from qsweep.spec import UNCOMPRESSED

        bound = self.spec.constraints.get("accuracy_drop_pp")
        records, by = list(self.records.values()), "latency_ms"
        loss = self._little(records) if bound is None or bound.max is None else bound.max
        most = f"accuracy_drop_pp={loss:g}"
        try:
            if best(records, Selector.parse(max=[most], by=by), self.spec).name == UNCOMPRESSED:
                by = "size_bytes"
        except SweepError as error:
            return [f"  {error}"]
        options = f"{sweep} --max {most} --by {by}"
        return [f"  qsweep best {options}", f"  qsweep promote {options} --name {self.spec.name}"]

    def _little(self, records: list[Record]) -> float:
        """A hundredth of what the accuracy may be, in points: what a person may give up for speed who has not said."""
        from qsweep.track.pareto import baseline

        fp32, judged_by = baseline(records), self.spec.task.judged_by
        whole = judged_by.range((fp32.metrics.accuracy if fp32 else None) or 0.0)
        return float(f"{0.01 * judged_by.scale * whole:.2g}")


def _place(number: int | None) -> str:
    return "" if number is None else f"#{number} "


def again(record: Record, judged_by: TaskMetric, sized: bool = False) -> str:
    """What came of the last repetition of a record, in one line: why it failed, or mean and spread with it."""
    from qsweep.track.table import draws_text, place_text

    failed = record.repetitions[-1].failure
    told = f"failed, {failed.kind}: {failed.message}" if failed else f"{draws_text(record, judged_by)} draws"
    return f"#{record.number:<3} {record.name} on {place_text(record, sized)} again: {told}"


def line(record: Record, judged_by: TaskMetric, sized: bool = False) -> str:
    """A record in one line; `sized`: with its batch size."""
    from qsweep.track.table import Column, place_text

    metrics, head = record.metrics, f"#{record.number:<3} {record.name} on {place_text(record, sized)}"
    if record.failure:
        kind = "" if record.state == "refused" else f", {record.failure.kind}"
        return f"{head}: {record.state}{kind}: {record.failure.message}"
    if record.duplicate_of is not None:
        return f"{head}: as #{record.duplicate_of}"
    texts = [] if metrics.accuracy is None else [Column("accuracy", judged_by).full(metrics.accuracy)]
    texts += [form.format(value) for name, form in SHOWN.items() if (value := getattr(metrics, name)) is not None]
    return f"{head}: {', '.join([*texts, f'{sum(record.seconds.values()):.1f} s'])}"
