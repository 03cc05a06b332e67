"""The Pareto front of records. Figures of a config that was repeated are those of all its evaluations together."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from qsweep.records import Call, Metrics, Record
from qsweep.spec import Constraint, Spec
from qsweep.study.points import asks_for

if TYPE_CHECKING:
    from numpy import ndarray

_TIMES = ("latency_ms", "latency_ratio", "throughput")
AVERAGED = ("accuracy", "accuracy_drop_pp")
"""Metrics of which a config that was repeated has the mean; sizes and counts are those of the artifact that ships."""
RESOLUTION = {"latency_ms": 0.10, "latency_ratio": 0.10, "throughput": 0.10, "size_bytes": 0.001}
"""Values within this share of each other are one value: two runs of one artifact differ so much in latency, and files
whose scales have more digits or fewer so much in size."""


class Measurement(NamedTuple):
    """One evaluation of a config: a record's own, or a repetition that came to its end."""

    of: int
    """Position of its record."""
    metrics: Metrics
    kernels: str
    call: Call
    """What its latency is that of."""


def of_target(spec: Spec, records: Sequence[Record]) -> list[Record]:
    """The model itself, and what runs as the spec asks, in its target or in baselines of its own: a person who ships
    for one does not choose what `float` shows in its place, or what was measured at another batch size before."""
    own = {config.uid() for config in spec.baselines}
    asked = cache(lambda target: asks_for(spec, json.loads(target)))
    return [r for r in records if not r.number or r.uid in own or asked(json.dumps(r.config["target"], sort_keys=True))]


def measurements(records: Sequence[Record]) -> list[Measurement]:
    """All evaluations of `records`: of each its own, then its repetitions."""
    found = []
    for i, record in enumerate(records):
        done = [repetition for repetition in record.repetitions if repetition.failure is None]
        runs = [(record.metrics, record.kernels), *((again.metrics, again.kernels) for again in done)]
        found += [Measurement(i, metrics, kernels or str(record.number), record.call) for metrics, kernels in runs]
    return found


def feasible(record: Record, objectives: Sequence[str], constraints: Mapping[str, Constraint] | None = None) -> bool:
    """Whether a record is complete, was evaluated itself, has all objectives and keeps all constraints: its own
    artifact does, which ships, and the mean over its repetitions does."""
    constraints = constraints or {}
    if record.state != "complete" or record.duplicate_of is not None:
        return False
    if any(getattr(record.metrics, name) is None for name in (*objectives, *constraints)):
        return False
    return all(bound.keeps(value) for name, bound in constraints.items() for value in figures(record, name))


def figures(record: Record, name: str) -> list[float]:
    """The value of a metric that ships, and its mean where that is another."""
    values = [getattr(m.metrics, name) for m in measurements([record])] if name in AVERAGED else []
    return [getattr(record.metrics, name), *([sum(values) / len(values)] if len(values) > 1 else [])]


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

    runs = measurements(records)
    columns = [judged(runs, name, values_of(runs, name)) for name in objectives]
    table: ndarray = np.array(columns, dtype=float).T.reshape(len(records), len(objectives)) * signs(objectives)
    return table


def values_of(runs: Sequence[Measurement], name: str) -> ndarray:
    """(m,): one metric of all evaluations."""
    import numpy as np

    return np.array([getattr(run.metrics, name) for run in runs], dtype=float)


def judged(runs: Sequence[Measurement], name: str, values: ndarray) -> ndarray:
    """(..., n), one for a record: `values` (..., m) of its evaluations as they are compared, those within RESOLUTION
    tied.

    Latencies are judged by their ratio to the baseline, where all have one: measured in turns with it, it survives what
    disturbs the milliseconds. Milliseconds are the ratio times those of the baseline at the same batch size. Of
    evaluations that run the same kernels each counts as the median of all.
    """
    import numpy as np

    if name in _TIMES:
        values = _medians(values * _steadied(runs, name), [run.kernels for run in runs])
    values = of_records(runs, name, values)
    if name in RESOLUTION:
        values = np.apply_along_axis(tied, -1, values, RESOLUTION[name])
    return values


def _steadied(runs: Sequence[Measurement], name: str) -> ndarray:
    """(m,): by what to multiply each of these times for it to be as it were had the baseline taken in each process what
    it takes at the median."""
    import numpy as np

    if name == "latency_ratio" or any(run.metrics.latency_ratio is None for run in runs):
        return np.ones(len(runs))
    baseline = values_of(runs, "latency_ms") / values_of(runs, "latency_ratio")
    factors: ndarray = _medians(baseline, [str(run.call) for run in runs]) / baseline
    return factors if name == "latency_ms" else 1 / factors


def of_records(runs: Sequence[Measurement], name: str, values: ndarray) -> ndarray:
    """(..., n) from `values` (..., m) of the evaluations: their mean if `name` is AVERAGED, else the record's own."""
    import numpy as np

    columns = [[i for i, run in enumerate(runs) if run.of == record] for record in range(runs[-1].of + 1)]
    width = None if name in AVERAGED else 1
    return np.stack([values[..., group[:width]].mean(axis=-1) for group in columns], axis=-1)


def _medians(values: ndarray, groups: Sequence[str]) -> ndarray:
    """(..., m): each value as the median of its group."""
    import numpy as np

    pooled = np.array(values)
    for group in set(groups):
        members = [i for i, name in enumerate(groups) if name == group]
        pooled[..., members] = np.median(pooled[..., members], axis=-1, keepdims=True)
    return pooled


def tied(values: ndarray, resolution: float) -> ndarray:
    """Each value as the least of its group; a group reaches from its least value to that share of it above."""
    import numpy as np

    leaders: list[float] = []
    for value in np.sort(values):
        if not leaders or value > leaders[-1] + resolution * abs(leaders[-1]):
            leaders.append(value)
    return np.array(leaders)[np.searchsorted(leaders, values, side="right") - 1]


def signs(objectives: Sequence[str]) -> ndarray:
    """(objectives,): 1 where less is better, else -1."""
    import numpy as np

    directions = Metrics.directions()
    return np.array([-1.0 if directions[name] == "maximize" else 1.0 for name in objectives])


def dominated(values: ndarray) -> ndarray:
    """(..., n): which rows of (..., n, k) losses another row dominates."""
    import numpy as np

    one, other = values[..., :, None, :], values[..., None, :, :]
    beaten: ndarray = np.any(np.all(other <= one, axis=-1) & np.any(other < one, axis=-1), axis=-1)
    return beaten
