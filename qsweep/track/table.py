"""The table of a sweep, made in one place: the CLI prints it, MLflow shows it as a note, the CSV holds it whole."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

from qsweep.records import OF_THE_TASK, SHARES, Metrics, Record
from qsweep.spec import Spec
from qsweep.tasks import ACCURACY, TaskMetric
from qsweep.track.pareto import front

Value = str | float | int | None


@dataclass(frozen=True)
class Column:
    """A column: the metric (or field of the record) it shows, and what the task is judged by."""

    key: str
    judged_by: TaskMetric = ACCURACY

    @property
    def words(self) -> str:
        """What it is called."""
        if self.key == "accuracy":
            return self.judged_by.name
        return _TITLES[self.key][0] if self.key in _TITLES else self.key.replace("_", " ")

    @property
    def unit(self) -> str:
        """That of its values; empty where they have none."""
        if self._judged:
            return self.judged_by.unit or ""
        return _TITLES[self.key][1] if self.key in _TITLES else ""

    @property
    def title(self) -> str:
        return f"{self.words} {self.unit}".strip()

    @property
    def scale(self) -> float:
        """What a value is multiplied by to be in the unit."""
        if self._judged:
            return self.judged_by.scale
        return 100.0 if self.key in SHARES else 1 / 1024 if self.key.endswith("_bytes") else 1.0

    def text(self, value: Value) -> str:
        """A value as a person reads it, without its unit."""
        if value is None:
            return "–"
        if isinstance(value, str) or self.key in _COUNTS:
            return str(value)
        if self._judged:
            return self.judged_by.text(value)
        if self.key in SHARES:
            return f"{self.scale * value:.{_DECIMALS.get(self.key, 2)}f}"
        if self.key.endswith("_bytes"):
            return f"{self.scale * value:,.1f}"
        if self.key in ("accuracy_drop_pp", "latency_ratio"):
            return f"{round(value, 2) + 0.0:.2f}"  # no -0.00
        return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.{3 if abs(value) < 10 else 1}f}"

    def full(self, value: Value) -> str:
        """The same with its unit."""
        return f"{self.text(value)} {self.unit}".strip()

    @property
    def _judged(self) -> bool:
        """Whether its values are in the unit of the task's metric; percentage points are no per cent."""
        return self.key in _JUDGED or (self.key == "accuracy_drop_pp" and not self.judged_by.share)

    @property
    def numeric(self) -> bool:
        """Whether the column is set flush right."""
        return self.key in _COUNTS or self.key in Metrics.model_fields


_COUNTS = ("number", "batch_size")
_JUDGED = OF_THE_TASK | {"draws"}
_DECIMALS = {"sparsity": 1, "int8_mac_fraction": 1}
"""Of shares in per cent that have no two."""
_TITLES = {
    "number": ("#", ""),
    "batch_size": ("batch", ""),
    "draws": ("mean of draws", ""),
    "accuracy_test": ("test", ""),
    "accuracy_mean": ("mean", ""),
    "accuracy_spread": ("spread", ""),
    "accuracy_simulated": ("simulated", ""),
    "accuracy_drop_pp": ("drop", "pp"),
    "size_bytes": ("size", "KiB"),
    "size_zstd_bytes": ("zstd", "KiB"),
    "size_theoretical_bytes": ("theoretical", "KiB"),
    "latency_ms": ("latency", "ms"),
    "latency_p95_ms": ("p95", "ms"),
    "latency_ratio": ("× fp32", ""),
    "throughput": ("throughput", "/s"),
    "int8_mac_fraction": ("int8 MACs", "%"),
    "parity_top1": ("parity", "%"),
    "sparsity": ("sparsity", "%"),
    "peak_memory_bytes": ("memory", "KiB"),
    "peak_device_memory_bytes": ("device memory", "KiB"),
    "energy_mj": ("energy", "mJ"),
    "bit_operations": ("bit operations", ""),
}
"""What columns are called and count in; of those of the task's metric it says that."""
_SHOWN = (
    "accuracy",
    "accuracy_test",
    "accuracy_drop_pp",
    "size_bytes",
    "latency_ms",
    "latency_ratio",
    "int8_mac_fraction",
    "parity_top1",
)


@dataclass(frozen=True)
class Table:
    """Columns and rows of plain values, best accuracy first."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[Value, ...], ...]

    def texts(self) -> list[list[str]]:
        """The rows as a person reads them."""
        return [[column.text(value) for column, value in zip(self.columns, row, strict=True)] for row in self.rows]

    def markdown(self, limit: int | None = None) -> str:
        """A Markdown table of the first `limit` rows."""
        lines = [[column.title for column in self.columns], ["--:" if c.numeric else ":--" for c in self.columns]]
        cells = lines + [[cell.replace("|", "\\|") for cell in row] for row in self.texts()[:limit]]
        return "".join(f"| {' | '.join(row)} |\n" for row in cells)

    def csv(self) -> str:
        """Comma-separated, full precision, the header by key; an empty cell where nothing was measured."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow([column.key for column in self.columns])
        writer.writerows(["" if value is None else value for value in row] for row in self.rows)
        return out.getvalue()


def front_table(records: Sequence[Record], spec: Spec) -> Table:
    """The front and the baselines, with the metrics that decide; other objectives and constraints of the spec too, and
    what compares batch sizes where there are several."""
    members = front(records, spec)
    chosen = {r.number: r for r in members} | {
        r.number: r for r in records if r.kind == "baseline" and r.state == "complete"
    }
    batches = ["batch_size"] if batch_sizes_differ(list(chosen.values())) else []
    extra = [*spec.objectives, *spec.constraints, *(["throughput"] if batches else [])]
    keys = [key for key in dict.fromkeys((*_SHOWN, *extra)) if any(_measured(r, key) for r in chosen.values())]
    draws = ["draws"] if any(r.repetitions for r in chosen.values()) else []
    fields = ["number", "name", "engine", *batches, "front", *draws]
    return _table(list(chosen.values()), [*fields, *keys], members, spec)


def _measured(record: Record, key: str) -> bool:
    return getattr(record.metrics, key) is not None


def full_table(records: Sequence[Record], spec: Spec) -> Table:
    """Every record with every metric, and why it failed."""
    fields = ("number", "name", "kind", "engine", "batch_size", "state", "front", "uid", "failure")
    return _table(records, [*fields, *Metrics.model_fields], front(records, spec), spec)


def _table(records: Sequence[Record], keys: Sequence[str], front: Sequence[Record], spec: Spec) -> Table:
    columns, members = [Column(key, spec.task.judged_by) for key in keys], {record.number for record in front}
    rows = sorted(records, key=by_accuracy)
    return Table(tuple(columns), tuple(tuple(value_of(r, column, members) for column in columns) for r in rows))


def by_accuracy(record: Record) -> tuple[bool, float, int]:
    """What puts the best accuracy first when records are sorted by it, and what has none last."""
    accuracy = record.metrics.accuracy
    return accuracy is None, -(accuracy or 0.0), record.number


def value_of(record: Record, column: Column, members: set[int]) -> Value:
    """What a column shows of a record; `members` are the numbers of the front."""
    key = column.key
    if key == "front":
        return membership(record, members)
    if key == "engine":
        return engine_text(record)
    if key == "batch_size":
        return record.call.batch_size
    if key == "draws":
        return draws_text(record, column.judged_by)
    if key == "failure":
        return f"{record.failure.kind}: {record.failure.message}" if record.failure else None
    value: Value = getattr(record.metrics, key) if key in Metrics.model_fields else getattr(record, key)
    return value


def draws_text(record: Record, judged_by: TaskMetric) -> str:
    """Mean and spread of the accuracy of a config that was repeated, without their unit, such as `92.41 ± 0.12 of 3`;
    the repetitions that failed. Empty where there is none."""
    failed = [again.failure.kind for again in record.repetitions if again.failure is not None]
    mean, spread = record.metrics.accuracy_mean, record.metrics.accuracy_spread
    parts = [f"{kind} once" for kind in failed]
    if mean is not None and spread is not None:
        count = 1 + len(record.repetitions) - len(failed)
        parts.insert(0, f"{judged_by.text(mean)} ± {judged_by.text(spread)} of {count}")
    return ", ".join(parts)


def mixed_bits(record: Record) -> str:
    """The weights of each width, the widest first, such as `8 bits: conv1.weight; 4 bits: conv2.weight, fc.weight`;
    empty where all have the same."""
    widths = sorted(set(record.layer_bits.values()), reverse=True)
    names = {width: [name for name, bits in record.layer_bits.items() if bits == width] for width in widths}
    return "; ".join(f"{bits} bits: {', '.join(names[bits])}" for bits in widths) if len(widths) > 1 else ""


def batch_sizes_differ(records: Sequence[Record]) -> bool:
    """Whether milliseconds of one record are those of more samples than another's."""
    return len({record.call.batch_size for record in records}) > 1


def several_sizes(spec: Spec) -> bool:
    """Whether a sweep asks for several batch sizes."""
    return len({target.batch_size for target in spec.target.configs()}) > 1


def engine_text(record: Record) -> str:
    """The engine, whether it runs eagerly, and whether it only simulates."""
    eager = record.config.get("target", {}).get("compile") is False
    notes = [
        note for note, on in (("eager", eager), ("simulated", record.simulated and record.state == "complete")) if on
    ]
    return f"{record.engine} ({', '.join(notes)})" if notes else record.engine


def place_text(record: Record, sized: bool = True) -> str:
    """Where a record runs: its engine, and if `sized` for how many samples at once, where that is more than one."""
    size = record.call.batch_size
    return f"{engine_text(record)}, batch {size}" if sized and size > 1 else engine_text(record)


def membership(record: Record, members: set[int]) -> str:
    """What the tables say of a record's place: `certain`, `probable`, `so far` while searching, or `baseline`."""
    if record.number in members:
        return record.front or "so far"
    return "baseline" if record.kind == "baseline" else ""
