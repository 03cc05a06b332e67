"""Configs on their way through the jobs: side by side until one asks to be alone; with retries and time limits."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from qsweep import alone
from qsweep.errors import Crashed, TimedOut, failure
from qsweep.executors.local import Local, Worker
from qsweep.records import Failure
from qsweep.spec import Run
from qsweep.study.folder import read_result, write_atomically

_POLL_SECONDS, _IDLE_SECONDS = 0.02, 0.2
"""How long a step waits: little, so that who asks to be alone does not wait; longer, not to disturb who is."""


@dataclass(eq=False)
class Evaluation:
    """Jobs to run in one folder, and how far they are."""

    folder: Path
    content: dict[str, Any]
    """What `job.json` tells the jobs."""
    jobs: tuple[str, ...] = ("build", "measure")
    attempts: int = 1
    place: int = 0
    """The smallest number that none that runs beside it has."""
    after: Evaluation | None = None
    """Must be over before this one is alone: what it needs the results of."""
    known: Callable[[Evaluation], int | None] = lambda _: None
    """The number of what has already been evaluated, if its results so far show that this is the same."""
    same_as: int | None = None
    """What `known` has said: all other jobs are left out."""
    worker: Worker | None = None
    failure: Failure | None = None
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    _spent: float = 0.0
    _since: float | None = None

    @property
    def job(self) -> str | None:
        """The job that is next or under way; None when all are done."""
        return next((job for job in self.jobs if job not in self.results), None)

    def seconds(self) -> float:
        """How long its jobs have run, pauses and waiting left out."""
        return self._spent + (time.monotonic() - self._since if self._since is not None else 0.0)

    def count(self, on: bool) -> None:
        """Let the clock of `seconds` run, or stop it."""
        self._spent, self._since = self.seconds(), time.monotonic() if on else None

    def collect(self) -> None:
        """Read the results that lie in the folder."""
        for job in self.jobs:
            if job not in self.results and (result := read_result(self.folder / f"{job}.json")):
                self.results[job] = result

    def merged(self, key: str) -> dict[str, float]:
        """`metrics` or `seconds` of all results together."""
        return {name: value for job in self.jobs for name, value in self.results.get(job, {}).get(key, {}).items()}


class Pipeline:
    """At most `run.workers` evaluations at a time; a job that has asked to be alone runs with all others paused, and so
    does one of another sweep on this host."""

    def __init__(self, executor: Local, jobs: str, run: Run) -> None:
        self.executor, self.jobs, self.run = executor, jobs, run
        self.active: list[Evaluation] = []

    @property
    def free(self) -> int:
        return self.run.workers - len(self.active)

    def add(self, evaluation: Evaluation) -> None:
        """Begin, or go on from what an earlier driver left: live workers and finished results are taken over."""
        evaluation.folder.mkdir(parents=True, exist_ok=True)
        evaluation.worker = self.executor.adopt(evaluation.folder)
        begun = read_result(evaluation.folder / "job.json")
        evaluation.attempts = begun.get("attempt", 1)
        taken = {other.place for other in self.active}
        free = next(place for place in count() if place not in taken)
        evaluation.place = free if evaluation.worker is None else begun.get("place", free)
        if evaluation.worker is not None:
            evaluation.count(on=True)
        evaluation.collect()
        for job, result in list(evaluation.results.items()):
            if "failure" in result and failure(**result["failure"]).stops:  # of an earlier driver
                del evaluation.results[job]
                (evaluation.folder / f"{job}.json").unlink()
        self.active.append(evaluation)
        self._continue(evaluation)
        self._give_way()

    @property
    def measuring(self) -> bool:
        """Whether a job is alone now. None comes to be but in `step`."""
        return any(e.worker is not None and alone.granted(e.folder) for e in self.active)

    def step(self) -> list[Evaluation]:
        """Begin what waits, let one be alone if it asks, wait a moment, return the evaluations that are over.

        Raises DiskFull and TaskChanged.
        """
        for evaluation in self.active:
            self._continue(evaluation)
        if not self.measuring:
            asking = [e for e in self.active if e.worker and alone.asked(e.folder) and e.after not in self.active]
            if asking and not alone.elsewhere():
                self._give_way(to=asking[0])
                alone.grant(asking[0].folder)
        self.executor.wait(_IDLE_SECONDS if self.measuring else _POLL_SECONDS)
        for evaluation in self.active:
            self._advance(evaluation)
        over = [e for e in self.active if e.worker is None and (e.failure or e.job is None)]
        self.active = [e for e in self.active if e not in over]
        self._give_way()
        return over

    def _advance(self, evaluation: Evaluation) -> None:
        worker = evaluation.worker
        if worker is None:
            return
        end = worker.poll()
        if end is None and evaluation.seconds() > self.run.trial_timeout:
            worker.kill()
            end = worker.poll()
            if end != "done":
                evaluation.failure = _failed(
                    TimedOut(f"ran longer than {self.run.trial_timeout:g} s in `{worker.name}`")
                )
        if end is None:
            return
        evaluation.worker = None
        evaluation.count(on=False)
        if end == "done":
            evaluation.collect()
        elif evaluation.failure is None:
            self._retry(
                evaluation, worker.name, _failed(Crashed(f"the worker of `{worker.name}` {worker.last_words()}"))
            )
        self._judge(evaluation)

    def _judge(self, evaluation: Evaluation) -> None:
        """Look at failures among the results: some are tried again, some stop the sweep."""
        for job, result in list(evaluation.results.items()):
            if "failure" not in result:
                continue
            failed = Failure.model_validate(result["failure"])
            error = failure(failed.kind, failed.message)
            if error.stops:
                (evaluation.folder / f"{job}.json").unlink()
                raise type(error)(f"`{evaluation.folder}`: {error}. {error.stops}")
            if error.retry:
                self._retry(evaluation, job, failed)
            else:
                evaluation.failure = failed

    def _retry(self, evaluation: Evaluation, job: str, failed: Failure) -> None:
        if evaluation.attempts >= self.run.attempts:
            evaluation.failure = failed
            return
        evaluation.attempts += 1
        evaluation.results.pop(job, None)
        (evaluation.folder / f"{job}.json").unlink(missing_ok=True)

    def _continue(self, evaluation: Evaluation) -> None:
        """Start its next job if it has no worker."""
        if evaluation.worker is not None or evaluation.failure is not None:
            return
        evaluation.collect()
        self._judge(evaluation)
        job = evaluation.job
        if job is None or evaluation.failure is not None:
            return
        evaluation.same_as = evaluation.known(evaluation)
        if evaluation.same_as is not None:
            evaluation.jobs = tuple(evaluation.results)
            return
        alone.forget(evaluation.folder)
        content = {**evaluation.content, "attempt": evaluation.attempts, "place": evaluation.place}
        write_atomically(evaluation.folder / "job.json", json.dumps(content, indent=1))
        evaluation.worker = self.executor.start(evaluation.folder, f"{self.jobs}:{job}", job)
        evaluation.count(on=True)

    def _give_way(self, to: Evaluation | None = None) -> None:
        """Pause all others while one is alone, or is about to be, or one of another sweep is; let them go on after it.

        The clock of `seconds` rests for those that are paused or wait to be alone.
        """
        first = to or next((e for e in self.active if e.worker is not None and alone.granted(e.folder)), None)
        side_by_side = first is None and not alone.elsewhere()
        for evaluation in self.active:
            worker = evaluation.worker
            if worker is None:
                continue
            if side_by_side or evaluation is first:
                worker.resume()
            else:
                worker.pause()
            evaluation.count(on=evaluation is first or (side_by_side and not alone.asked(evaluation.folder)))


def _failed(error: Crashed | TimedOut) -> Failure:
    return Failure(kind=error.kind, message=str(error))
