"""The front of what has been measured so far, and the volume it dominates. Pure arithmetic on records."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence

from qsweep.records import Metrics, Record
from qsweep.spec import Spec
from qsweep.study.front import feasible, of_target, pareto

Point = tuple[float, ...]


def baseline(records: Iterable[Record], name: str = "fp32") -> Record | None:
    """The baseline row called `name`, if it has finished."""
    return next((r for r in records if r.kind == "baseline" and r.name == name and r.state == "complete"), None)


def quickest_float(records: Iterable[Record], beside: Record) -> Record | None:
    """Of the baselines in fp32, bf16 and fp16 the quickest on the device and at the batch size of `beside`: what a
    speedup is to be held against."""
    floats = [
        r for r in records
        if r.kind == "baseline" and r.state == "complete" and r.call == beside.call
        and (r.config["compress"]["quantize"] or {"method": "cast"})["method"] == "cast"
    ]  # fmt: skip
    return min(floats, key=lambda r: r.metrics.latency_ratio or float("inf"), default=None)


def front(records: Sequence[Record], spec: Spec) -> list[Record]:
    """What nothing measured so far dominates; `Record.front` of these says what is certain, once the sweep is over."""
    found = pareto(of_target(spec, records), spec.objectives, spec.constraints)
    return sorted(found, key=lambda record: record.number)


def hypervolume(records: Sequence[Record], spec: Spec) -> float | None:
    """Volume dominated by the records, 0 (nothing beats fp32) to about 1, None without an fp32 baseline.

    Each objective is a gain over a reference: 10 percentage points below the accuracy of fp32 (where it is in another
    unit: a tenth of it) is 0 and its accuracy is 1; fp32's own size and latency are 0 and none at all is 1. What is
    worse than the reference adds nothing. Throughputs count as the time of a sample does.
    """
    base = baseline(records)
    if base is None:
        return None
    able = (record for record in of_target(spec, records) if feasible(record, spec.objectives, spec.constraints))
    points = {_scaled(record.metrics, base.metrics, spec) for record in able}
    return volume(point for point in points if point is not None and min(point) > 0)


def volume(points: Iterable[Point]) -> float:
    """Volume of the union of the boxes from the origin to `points` (no coordinate below 0): what each box holds that
    none after it does (While, Bradstreet & Barone 2012, "A Fast Way of Calculating Exact Hypervolumes")."""
    total, boxes = 0.0, _undominated(points)
    for number, box in enumerate(boxes, start=1):
        shared = (tuple(map(min, box, other)) for other in boxes[number:])
        total += math.prod(box) - volume(shared)
    return total


def _undominated(points: Iterable[Point]) -> list[Point]:
    kept: list[Point] = []
    for point in sorted(set(points), reverse=True):  # none dominates one before it
        if not any(all(map(operator.ge, other, point)) for other in kept):
            kept.append(point)
    return kept


def _scaled(metrics: Metrics, base: Metrics, spec: Spec) -> Point | None:
    point, judged_by = [], spec.task.judged_by
    tenth = 0.1 * judged_by.range(base.accuracy or 0.0)
    for name in spec.objectives:
        value, reference = getattr(metrics, name), getattr(base, name)
        if value is None or reference is None:
            return None
        if name == "accuracy":
            point.append((value - reference + tenth) / tenth)
        elif name == "accuracy_drop_pp":
            point.append(1 - value / (judged_by.scale * tenth))
        elif name == "throughput":
            point.append(1 - reference / value)
        elif Metrics.directions()[name] == "maximize":
            point.append(value)
        else:
            point.append(1 - value / reference if reference else 0.0)
    return tuple(point)
