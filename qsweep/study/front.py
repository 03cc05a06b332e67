"""The Pareto front of records, who is certain to be on it, and the volume it dominates."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from qsweep.records import Metrics, Record
from qsweep.spec import Constraint

if TYPE_CHECKING:
    from numpy import ndarray
    from numpy.random import Generator

Member = Literal["certain", "probable"]
CERTAIN = 0.95
"""Share of the resamples in which a certain member is on the front."""


def feasible(record: Record, objectives: Sequence[str], constraints: Mapping[str, Constraint] | None = None) -> bool:
    """Whether a record is complete, was evaluated itself, has all objectives and keeps all constraints."""
    constraints = constraints or {}
    if record.state != "complete" or record.duplicate_of is not None:
        return False
    if any(getattr(record.metrics, name) is None for name in (*objectives, *constraints)):
        return False
    return all(_keeps(getattr(record.metrics, name), bound) for name, bound in constraints.items())


def _keeps(value: float, bound: Constraint) -> bool:
    return (bound.max is None or value <= bound.max) and (bound.min is None or value >= bound.min)


def pareto(
    records: Sequence[Record], objectives: Sequence[str], constraints: Mapping[str, Constraint] | None = None
) -> list[Record]:
    """The feasible records that no other feasible record dominates: is at least as good in all, better in one."""
    candidates = [record for record in records if feasible(record, objectives, constraints)]
    if not candidates:
        return []
    on_front = ~dominated(losses(candidates, objectives))
    return [record for record, on in zip(candidates, on_front, strict=True) if on]


def losses(records: Sequence[Record], objectives: Sequence[str]) -> ndarray:
    """(n, objectives): values with the sign by which less is better."""
    import numpy as np

    rows = [[getattr(record.metrics, name) for name in objectives] for record in records]
    table: ndarray = np.array(rows, dtype=float).reshape(len(records), len(objectives)) * _signs(objectives)
    return table


def _signs(objectives: Sequence[str]) -> ndarray:
    import numpy as np

    directions = Metrics.directions()
    return np.array([-1.0 if directions[name] == "maximize" else 1.0 for name in objectives])


def dominated(values: ndarray) -> ndarray:
    """(..., n): which rows of (..., n, k) losses another row dominates."""
    import numpy as np

    one, other = values[..., :, None, :], values[..., None, :, :]
    beaten: ndarray = np.any(np.all(other <= one, axis=-1) & np.any(other < one, axis=-1), axis=-1)
    return beaten


def membership(
    records: Sequence[Record],
    objectives: Sequence[str],
    constraints: Mapping[str, Constraint] | None = None,
    scores: Mapping[int, ndarray] | None = None,
    seed: int = 0,
    resamples: int = 1000,
) -> dict[int, Member]:
    """The members of the front by number, each `certain` or `probable`.

    The front is drawn again `resamples` times: accuracies from validation samples drawn with replacement, the same
    ones for every record (`scores`, one value a sample, by number), latencies from the normal distribution whose 95 %
    interval was measured; sizes and counts are exact. A member of the observed front is certain if it is feasible and
    on the front in at least 95 % of the draws, else probable.
    """
    import numpy as np

    front = {record.number for record in pareto(records, objectives, constraints)}
    bounds = constraints or {}
    candidates = [record for record in records if feasible(record, (*objectives, *bounds))]
    if not front:
        return {}
    random = np.random.default_rng(seed)
    drawn = _draws(candidates, (*objectives, *bounds), scores or {}, random, resamples)
    values = np.stack([drawn[name] for name in objectives], axis=-1) * _signs(objectives)
    possible = np.ones(values.shape[:-1], dtype=bool)
    for name, bound in bounds.items():
        possible &= drawn[name] <= (np.inf if bound.max is None else bound.max)
        possible &= drawn[name] >= (-np.inf if bound.min is None else bound.min)
    values[~possible] = np.inf
    share = np.mean([on & ~dominated(row) for on, row in zip(possible, values, strict=True)], axis=0)
    certain = {record.number for record, part in zip(candidates, share, strict=True) if part >= CERTAIN}
    return {number: "certain" if number in certain else "probable" for number in sorted(front)}


def _draws(
    records: Sequence[Record],
    names: Sequence[str],
    scores: Mapping[int, ndarray],
    random: Generator,
    resamples: int,
) -> dict[str, ndarray]:
    """(resamples, n) values of each metric."""
    import numpy as np

    shifts = _accuracy_shifts(records, scores, random, resamples)
    reference = next((i for i, record in enumerate(records) if record.number == 0), None)
    drift = 0.0 if reference is None else shifts[:, [reference]]
    noise = random.standard_normal((resamples, len(records))) * _relative_error(records)
    drawn = {}
    for name in names:
        value = np.array([getattr(record.metrics, name) for record in records], dtype=float)
        if name == "accuracy":
            drawn[name] = value + shifts
        elif name == "accuracy_drop_pp":
            drawn[name] = value + 100 * (drift - shifts)
        elif name.startswith("latency_"):
            drawn[name] = value * (1 + noise)
        else:
            drawn[name] = np.broadcast_to(value, noise.shape)
    return drawn


def _accuracy_shifts(
    records: Sequence[Record],
    scores: Mapping[int, ndarray],
    random: Generator,
    resamples: int,
) -> ndarray:
    """(resamples, n): accuracy of each draw of the validation samples less that of all; 0 without scores."""
    import numpy as np

    shifts = np.zeros((resamples, len(records)))
    lengths = {len(scores[record.number]) for record in records if record.number in scores}
    for length in sorted(lengths):  # one, unless the validation split was changed by hand
        columns = [i for i, r in enumerate(records) if r.number in scores and len(scores[r.number]) == length]
        table = np.stack([scores[records[i].number] for i in columns], axis=1).astype(np.float32)
        table -= table.mean(axis=0)
        for row in range(resamples):
            counts = np.bincount(random.integers(length, size=length), minlength=length)
            shifts[row, columns] = counts.astype(np.float32) @ table / length
    return shifts


def _relative_error(records: Sequence[Record]) -> ndarray:
    """(n,): standard deviation of the latency's median, as a share of it, from its 95 % interval."""
    import numpy as np

    return np.array([_latency_error(record.metrics) for record in records])


def _latency_error(metrics: Metrics) -> float:
    low, high, middle = metrics.latency_low_ms, metrics.latency_high_ms, metrics.latency_ms
    if low is None or high is None or not middle:
        return 0.0
    return (high - low) / (2 * 1.96) / middle


def hypervolumes(
    records: Sequence[Record], objectives: Sequence[str], constraints: Mapping[str, Constraint] | None = None
) -> list[float]:
    """Share of the box of objectives that the records up to each one dominate, one value a record; never falls.

    The box reaches from the best value of each objective (0 where less is better) to the worst of all feasible
    records, so values of different lists do not compare.
    """
    import numpy as np

    valid = [record for record in records if feasible(record, objectives, constraints)]
    if not valid:
        return [0.0] * len(records)
    table = losses(valid, objectives)
    worst = table.max(axis=0)
    best = np.where(_signs(objectives) > 0, np.minimum(table.min(axis=0), 0.0), table.min(axis=0))
    extent = np.where(worst > best, worst - best, 1.0)
    rows = iter(((table - best) / extent).tolist())
    return _history([next(rows) if feasible(r, objectives, constraints) else None for r in records], len(objectives))


def _history(points: list[list[float] | None], dimensions: int) -> list[float]:
    """Volume under (1, …, 1) dominated by the points so far."""
    if dimensions == 1:
        best = 1.0
        return [1.0 - (best := min(best, *(point or [1.0]))) for point in points]
    import optuna

    with warnings.catch_warnings():  # the public way to Optuna's hypervolume, marked experimental since 3.3
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study = optuna.create_study(directions=["minimize"] * dimensions)
        state = optuna.trial.TrialState
        for point in points:
            finished = optuna.trial.create_trial(values=point or [1.0] * dimensions, state=state.COMPLETE)
            study.add_trial(finished)
        figure = optuna.visualization.plot_hypervolume_history(study, [1.0] * dimensions)
    return [float(value) for value in figure.data[0].y]
