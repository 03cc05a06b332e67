"""Who is certain to be on the front, and whose place is open: the front drawn again and again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from qsweep.records import Metrics, Record
from qsweep.spec import Constraint, Spec
from qsweep.study.front import (
    Measurement,
    dominated,
    feasible,
    judged,
    measurements,
    of_records,
    of_target,
    pareto,
    signs,
    values_of,
)

if TYPE_CHECKING:
    from numpy import ndarray
    from numpy.random import Generator

Member = Literal["certain", "probable"]
Scores = Mapping[int, "ndarray"]
"""By number: (N,) scores of the validation samples, or (draws, N) where the config was repeated, the record's first."""
CERTAIN = 0.95
"""Share of the draws in which a certain member is on the front."""


@dataclass(frozen=True)
class Places:
    """Where records stand, by drawing the front again and again.

    Drawn are accuracies, from validation samples with replacement, the same ones for every record (`scores`), and from
    the repetitions of a config with replacement; latencies, from the normal distribution whose 95 % interval was
    measured; sizes and counts are exact.
    """

    records: Sequence[Record]
    objectives: Sequence[str]
    constraints: Mapping[str, Constraint] = field(default_factory=dict)
    scores: Scores = field(default_factory=dict)
    seed: int = 0
    points: float = 100.0
    """Of `accuracy_drop_pp` in one of accuracy (`TaskMetric.scale`)."""
    draws: int = 1000

    @classmethod
    def of(cls, spec: Spec, records: Sequence[Record], scores: Scores) -> Places:
        points = spec.task.judged_by.scale
        return cls(of_target(spec, records), spec.objectives, spec.constraints, scores, spec.search.seed, points)

    @cached_property
    def front(self) -> list[Record]:
        """As it was observed, by number."""
        return sorted(pareto(self.records, self.objectives, self.constraints), key=lambda record: record.number)

    @cached_property
    def shares(self) -> dict[int, float]:
        """Of every record that could be on the front: the share of draws in which it is."""
        import numpy as np

        candidates = [record for record in self.records if feasible(record, (*self.objectives, *self.constraints))]
        if not candidates:
            return {}
        runs = measurements(candidates)
        drawn = self._drawn(candidates, runs)
        values = np.stack([judged(runs, name, drawn[name]) for name in self.objectives], axis=-1)
        values *= signs(self.objectives)
        possible = np.ones(values.shape[:-1], dtype=bool)
        for name, bound in self.constraints.items():
            value = of_records(runs, name, drawn[name])
            possible &= value <= (np.inf if bound.max is None else bound.max)
            possible &= value >= (-np.inf if bound.min is None else bound.min)
        values[~possible] = np.inf
        share = np.mean([on & ~dominated(row) for on, row in zip(possible, values, strict=True)], axis=0)
        return {record.number: float(part) for record, part in zip(candidates, share, strict=True)}

    def members(self) -> dict[int, Member]:
        """The members of the observed front by number: `certain` if there in at least 95 % of the draws, and no
        repetition failed; else `probable`."""

        def certain(record: Record) -> bool:
            return self.shares[record.number] >= CERTAIN and all(again.failure is None for again in record.repetitions)

        return {record.number: "certain" if certain(record) else "probable" for record in self.front}

    def contested(self) -> list[Record]:
        """The records whose place is open, the most open first: members that are not certain, and who is not on the
        front but in more than 5 % of the draws."""
        front = {record.number for record in self.front}
        known = {record.number: record for record in self.records}
        found = [n for n, part in self.shares.items() if part < CERTAIN and (n in front or part > 1 - CERTAIN)]
        return [known[number] for number in sorted(found, key=lambda number: (abs(self.shares[number] - 0.5), number))]

    def _drawn(self, records: Sequence[Record], runs: Sequence[Measurement]) -> dict[str, ndarray]:
        """(draws, m) values of each metric."""
        import numpy as np

        random = np.random.default_rng(self.seed)
        shifts = _accuracy_shifts(_by_run(records, runs, self.scores), random, self.draws)
        reference = next((i for i, run in enumerate(runs) if records[run.of].number == 0), None)
        drift = 0.0 if reference is None else shifts[:, [reference]]
        errors = np.array([_latency_error(run.metrics) for run in runs])
        noise = random.standard_normal((self.draws, len(runs))) * errors
        chosen = _chosen(records, runs, random, self.draws)
        drawn = {}
        for name in (*self.objectives, *self.constraints):
            value = np.broadcast_to(values_of(runs, name), noise.shape)
            if name == "accuracy":
                value = np.take_along_axis(value + shifts, chosen, axis=1)
            elif name == "accuracy_drop_pp":
                value = np.take_along_axis(value + self.points * (drift - shifts), chosen, axis=1)
            elif name.startswith("latency_"):
                value = value * (1 + noise)
            elif name == "throughput":
                value = value / (1 + noise)
            drawn[name] = value
        return drawn


def _by_run(records: Sequence[Record], runs: Sequence[Measurement], scores: Scores) -> list[ndarray | None]:
    """The scores (N,) of each evaluation, where they are known."""
    import numpy as np

    found: list[ndarray | None] = []
    for i, record in enumerate(records):
        count = sum(run.of == i for run in runs)
        rows = list(np.atleast_2d(scores[record.number])) if record.number in scores else []
        found += rows if len(rows) == count else [None] * count
    return found


def _chosen(records: Sequence[Record], runs: Sequence[Measurement], random: Generator, draws: int) -> ndarray:
    """(draws, m): for each evaluation one drawn from those of its record; the same one on every engine that a
    network was repeated on, as a seed that is lucky is so on all."""
    import numpy as np

    chosen = np.tile(np.arange(len(runs)), (draws, 1))
    drawn: dict[tuple[str, tuple[int, ...]], ndarray] = {}
    for i, record in enumerate(records):
        columns = np.array([column for column, run in enumerate(runs) if run.of == i])
        if len(columns) > 1:
            like = record.compressed, tuple(again.round for again in record.repetitions if again.failure is None)
            if like not in drawn:
                drawn[like] = random.integers(len(columns), size=(draws, len(columns)))
            chosen[:, columns] = columns[drawn[like]]
    return chosen


def _accuracy_shifts(scores: Sequence[ndarray | None], random: Generator, draws: int) -> ndarray:
    """(draws, m): accuracy of each draw of the validation samples less that of all; 0 without scores."""
    import numpy as np

    shifts = np.zeros((draws, len(scores)))
    lengths = {len(column) for column in scores if column is not None}
    for length in sorted(lengths):  # one, unless the validation split was changed by hand
        columns = [i for i, column in enumerate(scores) if column is not None and len(column) == length]
        all_scores = np.stack([scores[i] for i in columns], axis=1)  # type: ignore[misc]
        # equal columns once: the rounding of a product depends on their place, and the least of it would decide
        unique, which = np.unique(all_scores, axis=1, return_inverse=True)
        table = unique.astype(np.float32)
        table -= table.mean(axis=0)
        for row in range(draws):
            counts = np.bincount(random.integers(length, size=length), minlength=length)
            shifts[row, columns] = (counts.astype(np.float32) @ table / length)[which.ravel()]
    return shifts


def _latency_error(metrics: Metrics) -> float:
    """Standard deviation of the latency's median, as a share of it, from its 95 % interval."""
    low, high, middle = metrics.latency_low_ms, metrics.latency_high_ms, metrics.latency_ms
    if low is None or high is None or not middle:
        return 0.0
    return (high - low) / (2 * 1.96) / middle
