"""The report of a sweep: one HTML page that needs nothing but a browser."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qsweep.records import Metrics, Record
from qsweep.spec import Spec
from qsweep.tasks import TaskMetric
from qsweep.track.charts import scatter
from qsweep.track.pareto import baseline, front, quickest_float
from qsweep.track.table import (
    Column,
    batch_sizes_differ,
    by_accuracy,
    engine_text,
    mixed_bits,
    value_of,
)
from qsweep.track.view import DASHBOARDS

_COLUMNS = (
    "number", "name", "engine", "batch_size", "front", "accuracy", "draws", "accuracy_test", "accuracy_drop_pp",
    "size_bytes", "size_zstd_bytes", "latency_ms", "latency_ratio", "int8_mac_fraction", "sparsity", "parity_top1",
)  # fmt: skip
_VIEW = 0.12
"""How far below the best accuracy trials are in view, of its whole range."""


def pareto_html(records: Sequence[Record], spec: Spec, notes: Sequence[str] = ()) -> str:
    """The page: accuracy against size and latency, `notes` on these, all trials, what failed and why; plotly is inside
    of it."""
    import jinja2
    from plotly.offline import get_plotlyjs

    members = {record.number for record in front(records, spec)}
    done = [record for record in records if record.state == "complete" and record.duplicate_of is None]
    low, below = _view(done, members, spec.task.judged_by)
    template = jinja2.Environment(autoescape=True).from_string((DASHBOARDS / "report.html").read_text(encoding="utf-8"))
    return template.render(
        name=spec.name,
        lead=_lead(records, spec),
        tiles=_tiles(records, spec),
        plotly=get_plotlyjs(),
        charts=[
            scatter(done, members, Column(x), Column("accuracy", spec.task.judged_by), low)
            for x in ("size_bytes", "latency_ms", *(name for name in spec.objectives if name == "throughput"))
        ],
        below=below,
        notes=notes,
        failures=[
            {"number": r.number, "name": r.name, "engine": engine_text(r)} | r.failure.model_dump()
            for r in records if r.failure
        ],
        **_trials(done, members, spec),
    )  # fmt: skip


def _lead(records: Sequence[Record], spec: Spec) -> str:
    """One sentence: what was searched, for what, how far it got."""
    trials = sum(r.kind == "trial" and r.state == "complete" and r.duplicate_of is None for r in records)
    engines = sorted({engine_text(r) for r in records if r.kind == "trial" and r.state == "complete"})
    unit = spec.task.judged_by.unit
    units = {} if spec.task.judged_by.share or unit is None else {"accuracy": unit, "accuracy_drop_pp": unit}
    bounds = [
        f"{name} {sign} {value:g} {units.get(name, '')}".strip()
        for name, bound in spec.constraints.items()
        for sign, value in (("≤", bound.max), ("≥", bound.min)) if value is not None
    ]  # fmt: skip
    told = [
        f"{trials} trials measured",
        f"on {', '.join(engines)}" if engines else "",
        f"for {', '.join(spec.objectives)}",
    ]
    return ", ".join(part for part in [*told, f"with {' and '.join(bounds)}" if bounds else ""] if part)


def _tiles(records: Sequence[Record], spec: Spec) -> list[dict[str, str]]:
    """What a person looks for first: the baseline, and the best of the front by each objective."""
    members, base = front(records, spec), baseline(records)
    several = len({record.engine for record in records if record.kind == "trial" and record.state == "complete"}) > 1
    tiles = []
    if base is not None and base.metrics.accuracy is not None:
        accuracy, *others = (
            Column(name, spec.task.judged_by).full(getattr(base.metrics, name))
            for name in ("accuracy", "size_bytes", "latency_ms")
        )
        tiles.append({"what": "fp32 baseline", "value": accuracy, "which": ", ".join(others)})
    for name in spec.objectives if members else ():
        better = max if Metrics.directions()[name] == "maximize" else min
        best = better(members, key=lambda record: getattr(record.metrics, name) or 0.0)
        column = Column(name, spec.task.judged_by)
        value = column.full(getattr(best.metrics, name))
        told = f"{best.name} on {engine_text(best)}" if several else best.name
        which = f"{told}{_quickly(records, best) if name.startswith(('latency', 'throughput')) else ''}"
        tiles.append({"what": f"front: best {column.words}", "value": value, "which": which})
    measured = sum(r.state == "complete" and r.duplicate_of is None for r in records)
    return [*tiles, {"what": "on the front", "value": str(len(members)), "which": f"of {measured} measured"}]


def _quickly(records: Sequence[Record], best: Record) -> str:
    """For how many samples, if that differs, and the speedup over the quickest float, which mostly is not fp32."""
    other, ratio = quickest_float(records, best), best.metrics.latency_ratio
    batch = f", batch {best.call.batch_size}" if batch_sizes_differ(records) else ""
    if other is None or not ratio or not other.metrics.latency_ratio:
        return batch
    if other.number == best.number:
        return f"{batch}, a float: nothing on the front is quicker"
    return f"{batch}, {other.metrics.latency_ratio / ratio:.2f} times as fast as {other.name}, the quickest float"


def _view(done: Sequence[Record], members: set[int], judged_by: TaskMetric) -> tuple[float | None, str]:
    """Lower end of the accuracy axis where some trials lie so low that the rest would shrink to a line."""
    accuracies = [r.metrics.accuracy for r in done if r.metrics.accuracy is not None]
    if not accuracies:
        return None, ""
    on_front = [r.metrics.accuracy for r in done if r.metrics.accuracy is not None and r.number in members]
    floor = min([max(accuracies) - _VIEW * judged_by.range(max(accuracies)), *on_front])
    hidden = sum(accuracy < floor for accuracy in accuracies)
    if not hidden:
        return None, ""
    return min(a for a in accuracies if a >= floor), f"{hidden} trial{'s lie' if hidden > 1 else ' lies'}"


def _trials(done: Sequence[Record], members: set[int], spec: Spec) -> dict[str, Any]:
    """The table, with metrics of the spec that it would not show."""
    filled = {"draws": any(record.repetitions for record in done), "batch_size": batch_sizes_differ(done)}
    filled |= {name: any(getattr(record.metrics, name) is not None for record in done) for name in Metrics.model_fields}
    after = _COLUMNS.index("size_bytes")  # further to the right a narrow window would cut them off
    extra = [*spec.objectives, *spec.constraints, *(["throughput"] if batch_sizes_differ(done) else [])]
    asked = dict.fromkeys([*_COLUMNS[:after], *(name for name in extra if name not in _COLUMNS), *_COLUMNS[after:]])
    columns = [Column(key, spec.task.judged_by) for key in asked if filled.get(key, True)]
    rows = sorted(done, key=lambda r: (r.number not in members, r.kind != "baseline", *by_accuracy(r)))
    return {"columns": columns, "rows": [_row(record, columns, members) for record in rows]}


def _row(record: Record, columns: Sequence[Column], members: set[int]) -> dict[str, Any]:
    cells = []
    for column in columns:
        raw = value_of(record, column, members)
        text, plain = column.text(raw), "" if raw is None else raw
        cells.append({"text": text, "raw": plain, "numeric": column.numeric, "badge": column.key == "front"})
    about = (str(record.config.get("compress", "")), mixed_bits(record))
    mark = "on-front" if record.number in members else "baseline" if record.kind == "baseline" else ""
    return {"mark": mark, "cells": cells, "config": "\n".join(filter(None, about))}
