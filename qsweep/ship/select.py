"""Which trial ships: bounds on metrics, and the metric that decides."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from pydantic import ValidationError, field_validator, model_validator

from qsweep.config import Config
from qsweep.errors import SpecError, SweepError, did_you_mean
from qsweep.records import Metrics, Record
from qsweep.space import complaint
from qsweep.spec import Constraint, Spec, no_share, shares
from qsweep.study.front import feasible, figures, losses, of_target, tied
from qsweep.tasks import TaskConfig

_ENDS = {"failed": "failed", "refused": "was refused"}
_TIES = ("accuracy", "size_bytes", "latency_ms")
_ALIKE = 1e-6
"""Means of real numbers, such as dB, that differ by less of them differ by the order of their sums."""


class Selector(Config):
    """The best trial by one metric among those that keep all bounds, or one by its number."""

    trial: int | None = None
    """The number of the trial to take, whatever bounds it breaks."""
    max: dict[str, float] = {}
    """Upper bounds of metrics, such as `accuracy_drop_pp: 1`."""
    min: dict[str, float] = {}
    """Lower bounds of metrics."""
    by: str = "accuracy"
    """The metric that decides; ties go to the higher accuracy, then the smaller and the faster. Figures are compared as
    for the front: latencies within 10 % tie, and a config that was repeated has its mean accuracy."""

    @field_validator("max", "min")
    @classmethod
    def _metrics(cls, bounds: dict[str, float]) -> dict[str, float]:
        unknown = [name for name in bounds if name not in Metrics.model_fields]
        if unknown:
            known = sorted(Metrics.model_fields)
            raise ValueError(did_you_mean(f"must name metrics out of {known}", unknown[0], known))
        return bounds

    @field_validator("by")
    @classmethod
    def _directed(cls, name: str) -> str:
        if name not in Metrics.directions():
            known = sorted(Metrics.directions())
            raise ValueError(did_you_mean(f"must be one of {known}", name, known))
        return name

    @model_validator(mode="after")
    def _either(self) -> Selector:
        if self.trial is not None and (self.max or self.min):
            raise ValueError("either `trial` or bounds must say which (got both)")
        return self

    @classmethod
    def parse(
        cls,
        max: Iterable[str] = (),
        min: Iterable[str] = (),
        by: str = "accuracy",
        trial: int | None = None,
        task: TaskConfig | None = None,
    ) -> Selector:
        """From words such as `accuracy_drop_pp=1`, for a sweep with this task. Raises SpecError."""
        try:
            return cls(max=_bounds("max", max, task), min=_bounds("min", min, task), by=by, trial=trial)
        except ValidationError as error:
            told = complaint(error)
            raise SpecError(f"`--{told[1:]}" if told.startswith("`") else told) from None

    @property
    def bounds(self) -> dict[str, Constraint]:
        """By metric; those of a person may keep everything out, so that they are not looked at."""
        return {
            name: Constraint.model_construct(max=self.max.get(name), min=self.min.get(name))
            for name in self.max | self.min
        }

    def within(self, constraints: Mapping[str, Constraint]) -> Selector:
        """The same with these bounds, too."""
        upper = {name: bound.max for name, bound in constraints.items() if bound.max is not None}
        lower = {name: bound.min for name, bound in constraints.items() if bound.min is not None}
        for name, value in self.max.items():
            upper[name] = min(value, upper.get(name, value))
        for name, value in self.min.items():
            lower[name] = max(value, lower.get(name, value))
        return self.model_copy(update={"max": upper, "min": lower})

    def __str__(self) -> str:
        bounds = [f"{name} ≤ {bound:g}" for name, bound in self.max.items()]
        return " and ".join(bounds + [f"{name} ≥ {bound:g}" for name, bound in self.min.items()])


def best(records: Sequence[Record], selector: Selector, spec: Spec | None = None) -> Record:
    """The record to ship, baselines included, out of those that keep the bounds, and those of `spec` on its engines.

    Raises SweepError, with the nearest miss, where none does, and where there is no such trial.
    """
    if selector.trial is not None:
        return _numbered(records, selector.trial)
    if spec is not None:
        records, selector = of_target(spec, records), selector.within(spec.constraints)
    done = [r for r in records if r.state == "complete" and r.duplicate_of is None and _measured(r, selector.by)]
    if not done:
        raise SweepError(
            f"there must be a finished trial with `{selector.by}` to choose from (got {len(records)} records)"
        )
    able = [record for record in done if feasible(record, (), selector.bounds)]
    if not able:
        nearest = min(done, key=lambda record: _excess(record, selector))
        got = ", ".join(f"{name} {_told(nearest, name)}" for name in selector.bounds)
        raise SweepError(f"no trial keeps {selector}; the nearest is #{nearest.number} `{nearest.name}` with {got}")
    compared = [selector.by, *(name for name in _TIES if all(_measured(record, name) for record in able))]
    table = losses(able, compared)
    for column in (place for place, name in enumerate(compared) if name == "accuracy"):
        table[:, column] = tied(table[:, column], _ALIKE)
    order = sorted(zip(table.tolist(), able, strict=True), key=lambda pair: (pair[0], pair[1].number))
    return order[0][1]


def _numbered(records: Sequence[Record], number: int) -> Record:
    known = {record.number: record for record in records}
    record = known.get(number)
    if record is not None and record.duplicate_of is not None:
        record = known[record.duplicate_of]
    if record is None or record.state != "complete":
        got = "there is none of this number" if record is None else f"it {_ENDS[record.state]}"
        raise SweepError(f"trial {number} must be one that was measured ({got})")
    return record


def _told(record: Record, name: str) -> str:
    if not _measured(record, name):
        return "not measured"
    own, *mean = figures(record, name)
    return f"{own:,.6g}" + "".join(f" (mean {value:,.6g})" for value in mean)


def _bounds(option: str, words: Iterable[str], task: TaskConfig | None) -> dict[str, float]:
    bounds = {}
    for word in words:
        name, _, number = word.partition("=")
        try:
            bounds[name.strip()] = float(number)
        except ValueError:
            raise SpecError(f"`--{option}`: must be METRIC=NUMBER, like `accuracy_drop_pp=1` (got `{word}`)") from None
    for name in sorted(shares(task) & set(bounds)):
        if not 0 <= bounds[name] <= 1:
            raise SpecError(f"`--{option}`: a bound of {no_share(name, task)}")
    return bounds


def _measured(record: Record, name: str) -> bool:
    return getattr(record.metrics, name) is not None


def _excess(record: Record, selector: Selector) -> float:
    """By how much bounds are missed, each in units of itself."""
    total = 0.0
    for sign, bounds in ((1, selector.max), (-1, selector.min)):
        for name, bound in bounds.items():
            missed = [sign * (value - bound) for value in figures(record, name)] if _measured(record, name) else []
            total += max(0.0, *missed) / (abs(bound) or 1.0) if missed else float("inf")
    return total
