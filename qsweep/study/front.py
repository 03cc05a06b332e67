"""The Pareto front of records, and who is certain to be on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from qsweep.records import Metrics, Record
from qsweep.spec import Constraint

if TYPE_CHECKING:
    from numpy import ndarray
    from numpy.random import Generator

Member = Literal["certain", "probable"]
_TIMES = ("latency_ms", "latency_ratio")
RESOLUTION = {"latency_ms": 0.10, "latency_ratio": 0.10, "size_bytes": 0.001}
"""Values within this share of each other are one value: two runs of one artifact differ so much in latency, and files
whose scales have more digits or fewer so much in size."""
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

    columns = [_values(records, name) for name in objectives]
    table: ndarray = np.array(columns, dtype=float).T.reshape(len(records), len(objectives)) * _signs(objectives)
    return table


def _values(records: Sequence[Record], name: str) -> ndarray:
    """(n,): one objective of all records, as it is judged."""
    import numpy as np

    return _judged(records, name, np.array([getattr(record.metrics, name) for record in records], dtype=float))


def _judged(records: Sequence[Record], name: str, values: ndarray) -> ndarray:
    """(..., n) values of an objective, those within RESOLUTION tied.

    Latencies are judged by their ratio to the baseline, where all have one: measured in turns with it, it survives what
    disturbs the milliseconds. Of records that run the same kernels each counts as the median of all.
    """
    import numpy as np

    if name in _TIMES:
        ratios = [record.metrics.latency_ratio for record in records]
        times = np.array([getattr(record.metrics, name) for record in records], dtype=float)
        if None not in ratios:
            values = values / times * np.array(ratios, dtype=float)
        values = _pooled(values, [record.kernels or str(record.number) for record in records])
    if name in RESOLUTION:
        values = np.apply_along_axis(_tied, -1, values, RESOLUTION[name])
    return values


def _pooled(values: ndarray, groups: Sequence[str]) -> ndarray:
    """(..., n): each value as the median of its group."""
    import numpy as np

    pooled = np.array(values)
    for group in set(groups):
        members = [i for i, name in enumerate(groups) if name == group]
        pooled[..., members] = np.median(pooled[..., members], axis=-1, keepdims=True)
    return pooled


def _tied(values: ndarray, resolution: float) -> ndarray:
    """Each value as the least of its group; a group reaches from its least value to `resolution` above it."""
    import numpy as np

    leaders: list[float] = []
    for value in np.sort(values):
        if not leaders or value > leaders[-1] * (1 + resolution):
            leaders.append(value)
    return np.array(leaders)[np.searchsorted(leaders, values, side="right") - 1]


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
    columns = [_judged(candidates, name, drawn[name]) for name in objectives]
    values = np.stack(columns, axis=-1) * _signs(objectives)
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
