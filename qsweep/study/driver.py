"""The driver of a sweep: the one process that asks, tells and writes records. It computes nothing itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qsweep.errors import DataError, SweepError, TaskFailure, failure
from qsweep.executors.local import Local
from qsweep.records import Record
from qsweep.spec import Spec, TrialConfig
from qsweep.study import outcome
from qsweep.study.baselines import baselines, refusal
from qsweep.study.evaluated import Evaluated
from qsweep.study.final import Final
from qsweep.study.folder import SweepFolder, disk_full_is_said, read_result
from qsweep.study.interrupt import interruptible
from qsweep.study.pipeline import Evaluation, Pipeline
from qsweep.study.plan import check
from qsweep.study.points import Candidate, accepted
from qsweep.study.preloads import preloads

if TYPE_CHECKING:
    import optuna

    from qsweep.study.search import Search

STUCK = 10
"""A sampler that proposes so many known or refused configs in a row, as GP does, is given points of others' choice."""
PATIENCE = 100
"""After so many the search is over: there is nothing new, or nothing possible."""


def run(
    spec: Spec, root: Path, jobs: str = "qsweep.jobs", preload: Sequence[str] | None = None
) -> Generator[Record, None, bool]:
    """Run the sweep of `spec`, or go on with it; `root` is the folder that its relative paths start at.

    Yields the records of the sweep: those of earlier runs first, then each as soon as it is final and durable. When
    the last trial is over, records that were repeated, or whose membership of the front or test accuracy has changed,
    come once more: a record replaces an earlier one of the same number. Returns whether the sweep has finished; it has
    not after SIGINT or SIGTERM, of which the first stops it in order: what runs is killed and is done again by the next
    run. `preload` is what is imported before workers are forked, by default what `qsweep.jobs` and the engines need.

    Raises SpecError, SweepError (another driver, another spec), DiskFull, TaskChanged, and what `prepare` or the fp32
    baseline failed with; a trial that fails is a record.
    """
    check(spec)
    folder = SweepFolder(root, spec.name)
    with disk_full_is_said(folder.path), folder.lock():
        known = folder.claim(spec, spec.task.fingerprint(folder.root), baselines(spec))
        modules = preloads(spec) if preload is None else preload
        executor = Local(modules, folder.path / "server.log", spec.run.trial_timeout)
        try:
            with interruptible() as stopping:
                return (yield from Driver(spec, folder, executor, jobs, known, stopping).run())
        finally:
            executor.shutdown()


@dataclass
class Pending:
    """A number that has no record yet."""

    number: int
    candidate: Candidate
    trial: optuna.Trial | None = None
    """None: a baseline."""


class Driver:
    """The state of one `run`."""

    search: Search

    def __init__(
        self,
        spec: Spec,
        folder: SweepFolder,
        executor: Local,
        jobs: str,
        known: dict[int, TrialConfig],
        stopping: Callable[[], bool],
    ) -> None:
        self.spec, self.folder, self.executor, self.jobs = spec, folder, executor, jobs
        self.stopping = stopping
        self.known = known
        """Baselines by number."""
        self.first = next(number for number in count() if number not in known)
        """The number of the first trial of the study."""
        self.threads = folder.threads()
        self.model: str | None = None
        """The identity of the uncompressed model, once it is known."""
        self.interface: dict[str, Any] = {}
        """The parts of what it takes and gives, where these are several tensors."""
        self.samples: dict[str, Any] = {}
        """By what the user's samples are known again."""
        self.pipeline = self._pipeline()
        self.records: dict[int, Record] = {}
        self.evaluated = Evaluated(folder.path)
        self.asked: set[str] = set()
        """Uids of the trials so far."""
        self.evaluating: dict[int, Pending] = {}
        """By the id of their evaluation."""
        self.waiting: dict[str, list[Pending]] = {}
        """Trials whose config is just being evaluated for another number, by uid."""
        self.queue: list[Pending] = []
        self.outside: set[int] = set()
        """Numbers of trials of a space that was searched before, and is not now."""
        self.idle = 0

    def run(self) -> Generator[Record, None, bool]:
        for record in self.folder.records():
            self._remember(record)
            yield record
        preparing = self._prepare()
        from qsweep.study.search import Search  # imports Optuna while the fork server imports torch

        self.search = Search(self.spec, self.folder.path / "optuna.db")
        trials = [record for record in self.records.values() if record.kind == "trial"]
        self.search.recall(trials, self.first, last=max(self.known))
        self.outside = {record.number for record in trials if self.search.point(record) is None}
        if not self._prepared(preparing):
            return False
        yield from self._trials()
        if self.stopping():
            return False
        final = Final(self.spec, self.folder, self._pipeline, self._job, self.stopping)
        for record in final.run(self.records.values(), self._in_time):
            yield self._remember(record)
        return not self.stopping()

    def _pipeline(self) -> Pipeline:
        return Pipeline(self.executor, self.jobs, self.spec.run)

    def _in_time(self) -> bool:
        """Whether another evaluation may be begun."""
        return time.monotonic() < self.ends and not self.stopping()

    def _remember(self, record: Record) -> Record:
        self.records[record.number] = record
        self.evaluated.add(record)
        if record.kind == "trial":
            self.asked.add(record.uid)
        return record

    # -- before the trials

    def _prepare(self) -> Evaluation:
        folder = self.folder.path / "prepare"
        outcome.forget_failure(folder, "prepare")
        known = read_result(folder / "prepare.json")
        if known and (self.spec.task.own_weights or known.get("own_teacher")):
            outcome.forget(folder, ["prepare"])  # are the weights still those that the sweep began with?
        evaluation = Evaluation(folder, self._job(accepted(self.known[0]).plain, baseline=None), jobs=("prepare",))
        self.pipeline.add(evaluation)
        return evaluation

    def _prepared(self, evaluation: Evaluation) -> bool:
        while evaluation in self.pipeline.active and not self.stopping():
            self.pipeline.step()
        if failed := evaluation.failure:
            names_its_file = failed.kind in (DataError.__name__, TaskFailure.__name__) and failed.message[0] == "`"
            raise failure(failed.kind, failed.message if names_its_file else f"`task`: {failed.message}")
        result = read_result(evaluation.folder / "prepare.json")
        self.model, self.interface = result.get("model"), result.get("interface", {})
        self.samples = result.get("samples", {})
        if self.model is not None:
            self.folder.keep_model(self.model, self.samples)
        return not self.stopping()

    # -- the trials

    def _trials(self) -> Iterator[Record]:
        self.ends = time.monotonic() + (self.spec.search.timeout or float("inf"))
        self.queue = [Pending(i, accepted(config)) for i, config in self.known.items() if i not in self.records]
        for trial in self.search.orphans():
            pending = Pending(self.first + trial.number, self.search.candidate(trial), trial)
            done = self.records.get(pending.number)
            if done is not None:  # durable, but the driver died before it could tell
                self.search.tell(trial, done, list(self.records.values()))
            else:
                self.queue.append(pending)
        final: list[Record] = []
        while True:
            # Begin first, then hand on: what the consumer does with a record overlaps the next build.
            while not self.stopping() and self.pipeline.free > 0 and (new := self._next()) is not None:
                final += self._admit(new)
            if not self.pipeline.measuring:  # nor does the consumer run while latency is measured
                yield from final
                final = []
            if not self.pipeline.active or self.stopping():
                yield from final
                return
            for evaluation in self.pipeline.step():
                final += self._finish(evaluation)

    def _next(self) -> Pending | None:
        """What to begin next: a baseline, a trial that an earlier driver began, a new trial."""
        reference = self._reference()
        if reference is not None and reference.job == reference.jobs[0]:
            return None  # all others are compared to it: not before its artifact is there
        if self.queue:
            return self.queue.pop(0)
        if not self._may_ask() or (trial := self.search.ask(self.asked, self.idle >= STUCK)) is None:
            return None
        return Pending(self.first + trial.number, self.search.candidate(trial), trial)

    def _reference(self) -> Evaluation | None:
        """The evaluation of the first baseline while it runs."""
        return next((e for e in self.pipeline.active if self.evaluating[id(e)].number == 0), None)

    def _may_ask(self) -> bool:
        trials = (r for r in self.records.values() if r.kind == "trial" and r.number not in self.outside)
        done = sum(record.evaluated for record in trials)
        begun = sum(pending.trial is not None for pending in self.evaluating.values())
        room = done + begun < self.spec.search.trials
        patient = self.search.every_point or self.idle < PATIENCE
        return room and patient and self._in_time()

    def _admit(self, pending: Pending) -> Iterator[Record]:
        """Begin the evaluation of a config that is new and possible; of others the record is known at once."""
        uid = pending.candidate.uid
        if pending.trial is not None:
            self.asked.add(uid)
            pending.candidate = self._as_known(pending.candidate)
        self.idle += 1
        if (known := self.evaluated.config(uid)) is not None:
            yield self._conclude(pending, outcome.duplicate(self.records[known], pending.number))
        elif pending.candidate.refusal is not None:
            yield self._conclude(pending, self._record(pending, None))
        elif any(other.candidate.uid == uid for other in self.evaluating.values()):
            self.waiting.setdefault(uid, []).append(pending)
        else:
            self.idle = 0
            self._begin(pending)

    def _as_known(self, candidate: Candidate) -> Candidate:
        """`candidate`, refused where its engine has refused all baselines: it would be trained before it failed."""
        reason = refusal(candidate.engine, [r for r in self.records.values() if r.kind == "baseline"])
        return candidate if reason is None or candidate.refusal else replace(candidate, refusal=reason)

    def _begin(self, pending: Pending) -> None:
        folder = self.folder.trial(pending.number)
        outcome.write_config(folder, pending.candidate)
        baseline = self.folder.trial(0) if pending.number else None
        job = self._job(pending.candidate.plain, baseline)
        evaluation = Evaluation(folder, job, after=self._reference(), known=self.evaluated.artifact)
        self.evaluating[id(evaluation)] = pending
        self.pipeline.add(evaluation)

    def _finish(self, evaluation: Evaluation) -> Iterator[Record]:
        pending = self.evaluating.pop(id(evaluation))
        record = self._record(pending, evaluation)
        if pending.number == 0 and record.failure:
            outcome.forget(evaluation.folder, evaluation.jobs)
            outcome.forget(self.folder.path / "prepare", ["prepare"])  # what it has seen may be what was wrong
            message = f"the {record.name} baseline, to which all is compared, failed: {record.failure.message}"
            raise failure(record.failure.kind, message)
        yield self._conclude(pending, record)
        for follower in self.waiting.pop(record.uid, []):
            yield self._conclude(follower, outcome.duplicate(record, follower.number))

    def _record(self, pending: Pending, evaluation: Evaluation | None) -> Record:
        if evaluation is not None and evaluation.same_as is not None:
            return outcome.duplicate(self.records[evaluation.same_as], pending.number, pending.candidate)
        reference = self.records.get(0)
        return outcome.record(self.spec, pending.number, pending.candidate, evaluation, reference)

    def _conclude(self, pending: Pending, record: Record) -> Record:
        kind = "baseline" if pending.trial is None else "trial"
        record = record.model_copy(update={"kind": kind})
        self.folder.write(record)  # first of all
        if pending.trial is not None:
            self.search.tell(pending.trial, record, list(self.records.values()))
        return self._remember(record)

    def _whole(self, baseline: Path) -> Path:
        """The folder of what all are compared to. Raises SweepError where its artifact is gone: all would fail."""
        if read_result(baseline / "build.json").get("files") and not (baseline / "artifact").is_dir():
            raise SweepError(
                f"`{baseline / 'artifact'}`: must be there, as all trials are compared to it; remove `{baseline}` "
                "to have it built again"
            )
        return baseline

    def _job(self, plain: dict[str, Any], baseline: Path | None, draw: int | None = None) -> dict[str, Any]:
        return {
            "root": str(self.folder.root),
            "task": self.spec.task.model_dump(mode="json"),
            "config": plain,
            "measure": self.spec.measure.model_dump(mode="json"),
            "seed": self.spec.search.seed,
            "draw": self.spec.search.seed if draw is None else draw,
            "store": str(self.folder.store),
            "baseline": str(self._whole(baseline)) if baseline else None,
            "threads": self.threads,
            "model": self.model,
            "interface": self.interface,
            "samples": self.samples,
        }
