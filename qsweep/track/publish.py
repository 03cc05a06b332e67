"""Records go to MLflow as they come: one parent run a sweep, one child run a trial.

The sweep never waits for MLflow and never fails because of it. What it did not take is on disk, and is published with
the next record, at the end, or by the next `qsweep run`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator
from pathlib import Path
from threading import Thread

from qsweep.errors import TrackError
from qsweep.records import Record
from qsweep.spec import Spec
from qsweep.track.client import answering, connect, tracking_uri
from qsweep.track.runs import Runs, Status

log = logging.getLogger("qsweep.track")
_SHARE = 20
"""A server that never answers may take one part in so many of a sweep's time."""


def publish(records: Generator[Record, None, bool], spec: Spec, root: Path) -> Generator[Record, None, bool]:
    """Hand every record on as it comes, and publish it; at the end set every run's status, front and bundles.

    `records` is a driver's generator, and what it returns (whether the sweep has finished) is returned; `root` is the
    folder of the spec. Raises SpecError where `track.uri` cannot be one of MLflow's, before anything is run, and
    nothing else of its own: a server that is down is a warning.
    """
    publisher = Publisher(spec, root)
    warm_up = Thread(target=publisher.warm_up, daemon=True)
    warm_up.start()
    try:
        finished = yield from _published(records, publisher, warm_up)
    except BaseException as error:
        records.close()  # the driver stops first: what it leaves on disk is what gets published
        stopped = isinstance(error, GeneratorExit | KeyboardInterrupt)
        publisher.close("KILLED" if stopped else "FAILED")
        raise
    warm_up.join()
    publisher.close("FINISHED" if finished else "KILLED")
    return finished


def _published(
    records: Generator[Record, None, bool], publisher: Publisher, warm_up: Thread
) -> Generator[Record, None, bool]:
    while True:
        try:
            record = next(records)
        except StopIteration as end:
            return end.value is not False
        warm_up.join()
        publisher.take(record)
        yield record


class Publisher:
    """What is known of a sweep's records, what MLflow has of them, and the difference brought over."""

    def __init__(self, spec: Spec, root: Path) -> None:
        self.spec, self.uri = spec, tracking_uri(spec.track.uri, root)
        self.folder = root / "sweeps" / spec.name
        self.records: dict[int, Record] = {}
        self.owed: set[int] = set()
        """Numbers of records that MLflow may lack, or have otherwise."""
        self.runs: Runs | None = None
        self.failed_at = -float("inf")
        self.pause = 0.0
        self.warned = False
        self.summary_at = -float("inf")

    def warm_up(self) -> None:
        """Import MLflow and make the database while the driver prepares; what goes wrong is told when it matters."""
        try:
            connect(self.uri)
        except TrackError as error:
            log.debug("%s", error)

    def take(self, record: Record) -> None:
        """Publish `record`, and all that is still owed; never raises."""
        if self.runs is None:
            self._remember()  # a resumed sweep hands on only what is new
        self._know(record)
        if time.monotonic() >= self.failed_at + self.pause:
            self._bring_over(self._summarize_now_and_then)

    def close(self, status: Status) -> None:
        """Publish what is owed, the final front and its bundles, and end the parent run; never raises."""
        if self.runs is None and status == "FAILED":
            return  # another driver may hold this sweep, and its runs
        self._remember()
        if self.records:
            self._bring_over(lambda runs: runs.finish(list(self.records.values()), status))

    def _remember(self) -> None:
        """Read the records on disk: they are what is true."""
        for path in sorted(self.folder.glob("trials/*/record.json")):
            self._know(Record.model_validate_json(path.read_bytes()))

    def _know(self, record: Record) -> None:
        if record != self.records.get(record.number):
            self.records[record.number] = record
            self.owed.add(record.number)

    def _bring_over(self, then: Callable[[Runs], None]) -> None:
        began = time.monotonic()
        try:
            with answering(self.uri):
                self.runs = self.runs or Runs.attach(self.spec, self.uri, self.folder)
                refused = self._publish_owed(self.runs)
                then(self.runs)
            if refused:
                raise refused
            self.pause = 0.0
        except TrackError as error:
            self.failed_at = time.monotonic()
            self.pause = max(min(60.0, 2 * self.pause + 2), _SHARE * (self.failed_at - began))
            log.log(
                logging.DEBUG if self.warned else logging.WARNING,
                "%s; the sweep goes on, its records are kept in `%s` and published when it does",
                error, self.folder,
            )  # fmt: skip
            self.warned = True

    def _publish_owed(self, runs: Runs) -> TrackError | None:
        """Publish what is owed. One record that is refused does not stop the others; returns why it was."""
        refused = None
        for number in sorted(self.owed):
            record = self.records[number]
            try:
                if record.duplicate_of is None and not runs.has(record):
                    runs.put(record)
                self.owed.discard(number)
            except Exception as error:
                runs.check_alive()
                refused = TrackError(f"record {number} (`{record.name}`) must fit MLflow ({error})")
        return refused

    def _summarize_now_and_then(self, runs: Runs) -> None:
        if time.monotonic() >= self.summary_at + 5:
            runs.summarize(list(self.records.values()))
            self.summary_at = time.monotonic()
