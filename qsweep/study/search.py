"""Optuna, and nothing else that talks to it: ask, suggest, constrain, tell, and what a dead driver left."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qsweep.domains import Choice, Domain, behind
from qsweep.records import Metrics, Record
from qsweep.spec import Spec
from qsweep.study.folder import sqlite_url
from qsweep.study.points import Candidate, Point, at, candidate, drawn, enumerated, listed, read, tree

if TYPE_CHECKING:
    import optuna

_DRAWS = 1000
"""Points that are tried where a sampler repeats itself."""


class Search:
    """The study of one sweep. One process at a time may hold it."""

    def __init__(self, spec: Spec, path: Path) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        storage = _storage(path)
        directions = [Metrics.directions()[name] for name in spec.objectives]
        self.spec = spec
        self.study = optuna.create_study(
            storage=storage, study_name=spec.name, directions=directions, load_if_exists=True
        )
        self.study.sampler = sampler(spec, self.told)
        self.every_point = enumerated(spec)
        self.points = listed(spec) if self.every_point else drawn(spec, _DRAWS)

    @property
    def told(self) -> int:
        """How many trials the study has, whatever their state."""
        return len(self.study.get_trials(deepcopy=False))

    def ask(self, seen: set[str], stuck: bool) -> optuna.Trial | None:
        """A new trial: where all points are run the next one, where the sampler is `stuck` one that it did not propose,
        else the sampler's. None when every such point's uid is in `seen`."""
        from optuna.trial import TrialState

        if (self.every_point or stuck) and not self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            point = next((p for p in self.points if candidate(self.spec, at(p)).uid not in seen), None)
            if point is None:
                return None
            self.study.enqueue_trial(self._encoded(point))
        return self.study.ask()

    def recall(self, records: Sequence[Record], first: int, last: int) -> None:
        """Let the study have a trial for each of `records`, numbered from `first` on, and give no number again, none up
        to `last`: where the database lost the end of its file, or all of it, or another space was searched, the records
        are still there. Those that this space has teach the sampler again; empty trials stand for all others."""
        from optuna.trial import TrialState, create_trial

        trials = {record.number - first: record for record in records}
        for number in range(self.told, max(last - first, *trials, -1) + 1):
            record = trials.get(number)
            point = self.point(record) if record else None
            if record is None or point is None or self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
                self.study.add_trial(create_trial(state=TrialState.FAIL))
                continue
            self.study.enqueue_trial(self._encoded(point))
            trial = self.study.ask()
            self.candidate(trial)
            self.tell(trial, record, records)

    def point(self, record: Record) -> Point | None:
        """The point of the space that became `record`, of whatever version of the code; None where it has none."""
        uid = read(record.config).uid
        points = behind(tree(self.spec), record.config)
        return next((point for point in points if candidate(self.spec, at(point)).uid == uid), None)

    def orphans(self) -> list[optuna.Trial]:
        """Trials that a dead driver left RUNNING: there is one driver, so all of them. They keep their numbers."""
        from optuna import Trial
        from optuna.trial import TrialState

        running = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        return [Trial(self.study, frozen._trial_id) for frozen in running]

    def candidate(self, trial: optuna.Trial) -> Candidate:
        """The point that the trial stands for, its values suggested where they were not yet."""
        return candidate(self.spec, lambda path, domain: suggested(trial, path, domain))

    def tell(self, trial: optuna.Trial, record: Record, others: Sequence[Record]) -> None:
        """Tell what came of a trial. A config that fails is COMPLETE with the worst values seen and infeasible, so that
        every sampler learns from it: of a trial told FAIL they learn nothing (measured: 83 % of a budget spent on the
        broken third of a space, against 12 %)."""
        complete = record.state == "complete"
        trial.set_constraint("ok", -1.0 if complete else 1.0)
        for name, value in violations(self.spec, record.metrics if complete else None).items():
            trial.set_constraint(name, value)
        metrics = [record.metrics] if complete else [r.metrics for r in others if r.state == "complete"]
        self.study.tell(trial, [worst(name, metrics) for name in self.spec.objectives])

    def _encoded(self, point: Point) -> dict[str, Any]:
        """The point as Optuna's parameters."""
        encoded: dict[str, Any] = {}

        def follow(path: str, domain: Domain) -> Any:
            encoded[path] = encode(domain, point[path])
            return point[path]

        candidate(self.spec, follow)
        return encoded


def _storage(path: Path) -> optuna.storages.RDBStorage:
    """Sqlite in write-ahead mode. It waits for the disk at checkpoints only (2.7 ms for each of 20 commits a trial): a
    killed process loses nothing, and what a power cut takes lies in the records."""
    import optuna
    from sqlalchemy import event

    if path.exists() and not _whole(path):
        for part in path.parent.glob(f"{path.name}*"):
            os.replace(part, part.with_name(f"damaged-{part.name}"))
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA journal_mode=WAL")
    storage = optuna.storages.RDBStorage(sqlite_url(path), engine_kwargs={"connect_args": {"timeout": 60}})
    event.listen(storage.engine, "connect", lambda connection, _: connection.execute("PRAGMA synchronous=NORMAL"))
    storage.engine.dispose()  # the connection it was made with does not know
    return storage


def _whole(path: Path) -> bool:
    """Whether sqlite can read all of a database."""
    try:
        with closing(sqlite3.connect(path)) as database:
            return bool(database.execute("PRAGMA quick_check").fetchone() == ("ok",))
    except sqlite3.OperationalError:  # the disk, or a lock: the file may be well
        raise
    except sqlite3.DatabaseError:
        return False


def sampler(spec: Spec, told: int) -> optuna.samplers.BaseSampler:
    """The sampler that the spec names. A study that goes on must not draw its first random points again."""
    import warnings

    import optuna

    seed = (spec.search.seed + 1_000_003 * told) % 2**32  # NumPy takes no higher one
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if spec.search.sampler == "tpe":
            liar = spec.run.workers > 1  # with nothing else running it only doubles the reads of the database
            return optuna.samplers.TPESampler(multivariate=True, group=True, constant_liar=liar, seed=seed)
        if spec.search.sampler == "nsga2":
            # Several generations must fit the budget: 50, the default, makes most sweeps one random generation.
            size = min(50, max(8, spec.search.trials // 5))
            return optuna.samplers.NSGAIISampler(population_size=size, seed=seed)
        if spec.search.sampler == "gp":
            return optuna.samplers.GPSampler(seed=seed)  # the one sampler that imports torch
        return optuna.samplers.RandomSampler(seed=seed)


def suggested(trial: optuna.Trial, path: str, domain: Domain) -> Any:
    """Ask the trial for a value of `domain`, numbers as numbers: 4, 6, 8 bits have an order."""
    if not isinstance(domain, Choice):
        last = domain.values[-1] if domain.values else domain.high  # a step need not end on `high`
        if domain.integer:
            return trial.suggest_int(path, int(domain.low), int(last), step=int(domain.step or 1), log=domain.log)
        return trial.suggest_float(path, domain.low, last, step=domain.step, log=domain.log)
    if not domain.ordered:
        return trial.suggest_categorical(path, domain.labels)
    labels, step = _ordered(domain)
    if step:
        return trial.suggest_int(path, labels[0], labels[-1], step=step)
    return labels[trial.suggest_int(path, 0, len(labels) - 1)]


def encode(domain: Domain, value: Any) -> Any:
    """The parameter by which `suggested` gives `value`."""
    if isinstance(domain, Choice) and domain.ordered:
        labels, step = _ordered(domain)
        return value if step else labels.index(value)
    return value


def _ordered(domain: Choice) -> tuple[list[Any], int]:
    """Numeric labels in rising order, and their distance if all are integers at one distance, else 0."""
    labels: list[Any] = sorted(domain.labels)
    steps = {b - a for a, b in pairwise(labels)}
    even = len(steps) == 1 and all(isinstance(label, int) for label in labels)
    return labels, int(steps.pop()) if even else 0


def violations(spec: Spec, metrics: Metrics | None) -> dict[str, float]:
    """Every bound of the spec as a number that is at most 0 when it is kept; 1 where nothing was measured."""
    return dict(_violations(spec, metrics))


def _violations(spec: Spec, metrics: Metrics | None) -> Iterator[tuple[str, float]]:
    for name, bound in spec.constraints.items():
        value = getattr(metrics, name) if metrics is not None else None
        if bound.max is not None:
            yield f"{name}.max", 1.0 if value is None else value - bound.max
        if bound.min is not None:
            yield f"{name}.min", 1.0 if value is None else bound.min - value


def worst(name: str, metrics: Sequence[Metrics]) -> float:
    """The worst value of an objective among `metrics`; 0 where there is none."""
    values = [value for m in metrics if (value := getattr(m, name)) is not None]
    pick = min if Metrics.directions()[name] == "maximize" else max
    return float(pick(values, default=0.0))
