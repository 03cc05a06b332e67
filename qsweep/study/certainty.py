"""Who is certain to be on the front, and whose place is open: the front drawn again and again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from qsweep.records import Metrics, Record
from qsweep.spec import Constraint
from qsweep.study.front import (
    Measurement,
    dominated,
    feasible,
    judged,
    measurements,
    of_records,
    pareto,
    signs,
    values_of,
)

if TYPE_CHECKING:
    from numpy import ndarray
    from numpy.random import Generator

Member = Literal["certain", "probable"]
Bounds = Mapping[str, Constraint]
Scores = Mapping[int, "ndarray"]
"""By number: (N,) scores of the validation samples, or (draws, N) where the config was repeated, the record's first."""
CERTAIN = 0.95
"""Share of the resamples in which a certain member is on the front."""


def membership(
    records: Sequence[Record],
    objectives: Sequence[str],
    constraints: Bounds | None = None,
    scores: Scores | None = None,
    seed: int = 0,
    resamples: int = 1000,
    points: float = 100.0,
) -> dict[int, Member]:
    """The members of the front by number, each `certain` or `probable`.

    A member of the observed front is certain if it is feasible and on the front in at least 95 % of the draws
    (`shares`), and no repetition of it failed; else probable.
    """
    front = pareto(records, objectives, constraints)
    share = shares(records, objectives, constraints, scores, seed, resamples, points) if front else {}

    def certain(record: Record) -> bool:
        return share[record.number] >= CERTAIN and all(again.failure is None for again in record.repetitions)

    members = sorted(front, key=lambda record: record.number)
    return {record.number: "certain" if certain(record) else "probable" for record in members}


def contested(
    records: Sequence[Record],
    objectives: Sequence[str],
    constraints: Bounds | None = None,
    scores: Scores | None = None,
    seed: int = 0,
    resamples: int = 1000,
    points: float = 100.0,
) -> list[Record]:
    """The records whose place is open, the most open first: members that are not certain, and who is not on the front
    but in more than 5 % of the draws."""
    front = {record.number for record in pareto(records, objectives, constraints)}
    share = shares(records, objectives, constraints, scores, seed, resamples, points)
    known = {record.number: record for record in records}
    found = [n for n, part in share.items() if part < CERTAIN and (n in front or part > 1 - CERTAIN)]
    return [known[number] for number in sorted(found, key=lambda number: (abs(share[number] - 0.5), number))]


def shares(
    records: Sequence[Record],
    objectives: Sequence[str],
    constraints: Bounds | None = None,
    scores: Scores | None = None,
    seed: int = 0,
    resamples: int = 1000,
    points: float = 100.0,
) -> dict[int, float]:
    """Of every record that could be on the front: the share of `resamples` draws in which it is.

    Drawn are accuracies, from validation samples with replacement, the same ones for every record (`scores`), and from
    the repetitions of a config with replacement; latencies, from the normal distribution whose 95 % interval was
    measured; sizes and counts are exact. `points`: of `accuracy_drop_pp` in one of accuracy (`TaskMetric.scale`).
    """
    import numpy as np

    bounds = constraints or {}
    candidates = [record for record in records if feasible(record, (*objectives, *bounds))]
    if not candidates:
        return {}
    runs, random = measurements(candidates), np.random.default_rng(seed)
    drawn = _draws(candidates, runs, (*objectives, *bounds), scores or {}, random, resamples, points)
    values = np.stack([judged(runs, name, drawn[name]) for name in objectives], axis=-1) * signs(objectives)
    possible = np.ones(values.shape[:-1], dtype=bool)
    for name, bound in bounds.items():
        value = of_records(runs, name, drawn[name])
        possible &= value <= (np.inf if bound.max is None else bound.max)
        possible &= value >= (-np.inf if bound.min is None else bound.min)
    values[~possible] = np.inf
    share = np.mean([on & ~dominated(row) for on, row in zip(possible, values, strict=True)], axis=0)
    return {record.number: float(part) for record, part in zip(candidates, share, strict=True)}


def _draws(
    records: Sequence[Record],
    runs: Sequence[Measurement],
    names: Sequence[str],
    scores: Scores,
    random: Generator,
    resamples: int,
    points: float,
) -> dict[str, ndarray]:
    """(resamples, m) values of each metric."""
    import numpy as np

    shifts = _accuracy_shifts(_by_run(records, runs, scores), random, resamples)
    reference = next((i for i, run in enumerate(runs) if records[run.of].number == 0), None)
    drift = 0.0 if reference is None else shifts[:, [reference]]
    errors = np.array([_latency_error(run.metrics) for run in runs])
    noise = random.standard_normal((resamples, len(runs))) * errors
    chosen = _chosen(records, runs, random, resamples)
    drawn = {}
    for name in names:
        value = np.broadcast_to(values_of(runs, name), noise.shape)
        if name == "accuracy":
            value = np.take_along_axis(value + shifts, chosen, axis=1)
        elif name == "accuracy_drop_pp":
            value = np.take_along_axis(value + points * (drift - shifts), chosen, axis=1)
        elif name.startswith("latency_"):
            value = value * (1 + noise)
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


def _chosen(records: Sequence[Record], runs: Sequence[Measurement], random: Generator, resamples: int) -> ndarray:
    """(resamples, m): for each evaluation one drawn from those of its record; the same one on every engine that a
    network was repeated on, as a seed that is lucky is so on all."""
    import numpy as np

    chosen = np.tile(np.arange(len(runs)), (resamples, 1))
    drawn: dict[tuple[str, tuple[int, ...]], ndarray] = {}
    for i, record in enumerate(records):
        columns = np.array([column for column, run in enumerate(runs) if run.of == i])
        if len(columns) > 1:
            like = record.compressed, tuple(again.round for again in record.repetitions if again.failure is None)
            if like not in drawn:
                drawn[like] = random.integers(len(columns), size=(resamples, len(columns)))
            chosen[:, columns] = columns[drawn[like]]
    return chosen


def _accuracy_shifts(scores: Sequence[ndarray | None], random: Generator, resamples: int) -> ndarray:
    """(resamples, m): accuracy of each draw of the validation samples less that of all; 0 without scores."""
    import numpy as np

    shifts = np.zeros((resamples, len(scores)))
    lengths = {len(column) for column in scores if column is not None}
    for length in sorted(lengths):  # one, unless the validation split was changed by hand
        columns = [i for i, column in enumerate(scores) if column is not None and len(column) == length]
        table = np.stack([scores[i] for i in columns], axis=1).astype(np.float32)  # type: ignore[misc]
        table -= table.mean(axis=0)
        for row in range(resamples):
            counts = np.bincount(random.integers(length, size=length), minlength=length)
            shifts[row, columns] = counts.astype(np.float32) @ table / length
    return shifts


def _latency_error(metrics: Metrics) -> float:
    """Standard deviation of the latency's median, as a share of it, from its 95 % interval."""
    low, high, middle = metrics.latency_low_ms, metrics.latency_high_ms, metrics.latency_ms
    if low is None or high is None or not middle:
        return 0.0
    return (high - low) / (2 * 1.96) / middle
