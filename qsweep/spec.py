"""The spec: what `qsweep run spec.yaml` reads. Everything a sweep depends on is a field of these models."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    JsonValue,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from qsweep.config import Config, Listed
from qsweep.distill import Distill
from qsweep.engines import Engine
from qsweep.engines.float import Float
from qsweep.errors import SpecError, did_you_mean
from qsweep.prune import Prune
from qsweep.quantize import Quantize
from qsweep.quantize.trained import Trained
from qsweep.records import OF_THE_TASK, SHARES, Metrics
from qsweep.space import Space, Where, complaint_at
from qsweep.tasks import AnyTask, TaskConfig
from qsweep.yamlfile import line_of, read_mapping

UNCOMPRESSED = "fp32"
"""The name of the model as it is."""


class Compression(Config):
    """What is done to the model, in this order. `null` leaves a stage out."""

    prune: Prune | None = None
    distill: Distill | None = None
    quantize: Quantize | None = None

    def canonical(self) -> Self:
        idle = self.distill is not None and not self.distill.trains and not isinstance(self.quantize, Trained)
        return super().canonical().with_defaults(*["distill"] * idle)

    def stages(self) -> list[Prune | Distill | Quantize]:
        """The stages that are there, in their order."""
        return [stage for stage in (self.prune, self.distill, self.quantize) if stage is not None]


class TrialConfig(Config):
    """One point of the search: how the model is compressed and what runs it."""

    compress: Compression = Compression()
    target: Engine

    def canonical(self) -> Self:
        idle = isinstance(self.target, Float) and self.target.simulate and not self.simulated
        target = self.target.model_copy(update={"simulate": False}) if idle else self.target
        return super().canonical().model_copy(update={"target": target})

    @property
    def simulated(self) -> bool:
        """Whether what needs integer kernels runs in floating point."""
        quantize = self.compress.quantize
        return self.target.engine == "float" and quantize is not None and not quantize.in_float

    @property
    def name(self) -> str:
        """A name that decodes, such as `qat-w4s-a8a-prune50-T4`."""
        done = self.compress
        stages = [stage for stage in (done.quantize, done.prune, done.distill) if stage is not None]
        return "-".join(stage.label() for stage in stages) if stages else UNCOMPRESSED


class Constraint(Config):
    """Bounds of a metric; at least one."""

    max: float | None = None
    min: float | None = None

    @model_validator(mode="after")
    def _bounded(self) -> Constraint:
        if self.max is None and self.min is None:
            raise ValueError("must have `max`, `min` or both")
        if self.max is not None and self.min is not None and self.min > self.max:
            raise ValueError("`min` must not be above `max`")
        return self

    def keeps(self, value: float) -> bool:
        """Whether `value` is within them."""
        return (self.max is None or value <= self.max) and (self.min is None or value >= self.min)


_DURATION = r"^(\d+(\.\d+)?[smhd])+$"
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def _seconds(value: Any) -> Any:
    """`90`, `45s`, `30m`, `1h`, `2d`, `1h30m` in seconds."""
    if not isinstance(value, str):
        return value
    if not re.fullmatch(_DURATION, value):
        raise ValueError("must be seconds or a duration such as `30m` or `1h30m`")
    return sum(float(number) * _UNITS[unit] for number, _, unit in re.findall(r"(\d+(\.\d+)?)([smhd])", value))


_Written = Annotated[float, Field(gt=0)] | Annotated[str, Field(pattern=_DURATION)]
Seconds = Annotated[float, Field(gt=0), BeforeValidator(_seconds, json_schema_input_type=_Written)]


class Search(Config):
    """How the space is searched."""

    sampler: Literal["tpe", "nsga2", "gp", "random", "grid"] = "tpe"
    """`grid` runs every point of a space without ranges of real numbers; a space no larger than `trials` is
    run so whatever the sampler."""
    trials: Annotated[int, Field(ge=1)] = 50
    """Distinct configs to evaluate, baselines not counted."""
    timeout: Seconds | None = None
    """No trial is started after this long, counted from the start of each `qsweep run`; a number of seconds or `30m`,
    `1h`."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    repeats: Annotated[int, Field(ge=0)] | None = None
    """Evaluations after the last trial, spent on near ties: a config whose place on the front is open runs again with
    another seed, and so another calibration draw, on every engine that it is compared on. 0: none; null: one for every
    ten `trials`."""


class Track(Config):
    """Where MLflow keeps the sweep."""

    uri: str | None = None
    """None: `MLFLOW_TRACKING_URI` if it is set, else `mlflow.db` (sqlite) beside the spec."""
    experiment: str | None = None
    """None: the sweep's name."""


class Run(Config):
    """How trials are executed on this machine."""

    workers: Annotated[int, Field(ge=1, le=256)] = 1
    """Processes that build artifacts side by side, of several GPUs each on one of its own as far as they go; latency is
    measured by one alone, on the first GPU."""
    trial_timeout: Seconds = 6 * 3600
    """A trial that runs longer fails as `TimedOut`."""
    attempts: Annotated[int, Field(ge=1)] = 2
    """How often a trial is tried when its worker dies or memory runs out."""


class Measure(Config):
    """How an artifact is measured."""

    parity_samples: Annotated[int, Field(ge=1)] = 1024
    """Validation samples on which the artifact is compared with its simulation."""
    parity_top1: Annotated[float, Field(ge=0, le=1)] = 0.95
    """A trial that agrees with its simulation on a smaller share fails as `ParityFailure`. Outputs (N, C, ...), and
    (N, ..., C) of tokens with labels (N, ...), agree in the largest of C where labels are numbers of classes. Else, as
    of regressions and images, whose labels are floats or have the shape of outputs, and of several outputs, numbers
    agree that differ by at most 2 % of the range that theirs of C has."""
    latency_pairs: Annotated[int, Field(ge=5)] = 50
    """Interleaved pairs of calls, artifact and fp32 baseline, after warm-up."""
    latency_seconds: Annotated[float, Field(gt=0)] = 2.0
    """Fewer pairs are taken where they would need longer than this, but at least 10."""


BOUNDED = set(Metrics.model_fields) - {"accuracy_test", "accuracy_mean", "accuracy_spread"}
"""Metrics that constraints may name: the others are there only when the search is over."""


def shares(task: TaskConfig | None) -> frozenset[str]:
    """The metrics from 0 to 1 of a sweep with this task."""
    return SHARES if task is None or task.judged_by.share else SHARES - OF_THE_TASK


def no_share(name: str, task: TaskConfig | None) -> str:
    """What is wrong with a bound of such a metric that is not from 0 to 1."""
    own = name in OF_THE_TASK and task is not None and "metric" in type(task).model_fields
    unit = "; in a unit of its own with `task.metric.unit`" if own else ""
    return f"`{name}`, a share, must be from 0 to 1 (0.9 is 90 %{unit})"


def _names(known: Iterable[str], where: str) -> Any:
    """Tell editors the names there are; what is refused, and how it is said, is the validators' affair."""
    names: dict[str, JsonValue] = {"type": "string", "enum": list[JsonValue](sorted(known))}
    return Field(json_schema_extra={where: names})


class Spec(Config):
    """One sweep: a task, a space of compressed versions, a target, and what is better."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    task: AnyTask
    compress: Space[Compression]
    target: Space[Engine]
    objectives: Annotated[Listed[tuple[str, ...]], _names(Metrics.directions(), "items")] = (
        "accuracy",
        "size_bytes",
        "latency_ms",
    )
    """Metrics that span the Pareto front."""
    standard_baselines: Listed[tuple[Literal["bf16", "fp16", "int8"], ...]] = ("bf16", "fp16", "int8")
    """What stands beside the trials on every engine (fp16: on GPUs), with the model as it is, which always does."""
    baselines: Listed[tuple[TrialConfig, ...]] = ()
    """Configs to measure beside these and the trials, such as what is in production now."""
    constraints: Annotated[dict[str, Constraint], _names(BOUNDED, "propertyNames")] = {}
    """Bounds of metrics, used by the sampler, `qsweep best`, `promote` and `export`; members of the front keep them."""
    search: Search = Search()
    measure: Measure = Measure()
    track: Track = Track()
    run: Run = Run()

    @field_validator("name")
    @classmethod
    def _free_name(cls, name: str) -> str:
        if name == "store":
            raise ValueError("must not be `store`, the folder of results that sweeps share")
        return name

    @field_validator("objectives")
    @classmethod
    def _known_objectives(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        known = Metrics.directions()
        unknown = [name for name in names if name not in known]
        if unknown or not names or len(set(names)) < len(names):
            message = f"must be different metrics out of {sorted(known)}"
            raise ValueError(did_you_mean(message, unknown[0], known) if unknown else message)
        return names

    @field_validator("constraints", mode="before")
    @classmethod
    def _bounds_of_known_metrics(cls, bounds: Any) -> Any:
        """Names first: a metric that there is not has no bounds that could be right."""
        if isinstance(bounds, dict):
            for name in bounds:
                if name not in BOUNDED:
                    raise ValueError(did_you_mean(f"must name metrics out of {sorted(BOUNDED)}", name, sorted(BOUNDED)))
            for name, bound in bounds.items():
                if not isinstance(bound, dict | Constraint):
                    raise ValueError(f"`{name}` must have bounds, such as {{max: 1}}")
        return bounds

    @field_validator("constraints")
    @classmethod
    def _bounds_of_shares(cls, bounds: dict[str, Constraint], info: ValidationInfo) -> dict[str, Constraint]:
        task = info.data.get("task")
        for name in sorted(shares(task) & set(bounds)):
            if any(value is not None and not 0 <= value <= 1 for _, value in bounds[name]):
                raise ValueError(f"bounds of {no_share(name, task)}")
        return bounds

    @field_validator("baselines")
    @classmethod
    def _accepted(cls, configs: tuple[TrialConfig, ...]) -> tuple[TrialConfig, ...]:
        for number, config in enumerate(configs):
            if (reason := config.target.refuses(config.compress)) is not None:
                raise ValueError(f"number {number} must be one that its engine takes ({reason})")
        return configs

    @model_validator(mode="after")
    def _possible(self) -> Spec:
        """At least one config of the space must be one that its engine takes."""
        reasons = [engine.refuses(config) for engine in self.target.configs() for config in self.compress.configs()]
        if all(reasons):
            raise ValueError(
                f"no config of `compress` can run on `target`: {'; '.join(sorted(set(map(str, reasons))))}"
            )
        return self


def load_spec(path: str | Path) -> Spec:
    """Read and validate a YAML spec. Raises SpecError with line and path in the spec, what must hold, what came."""
    content = read_mapping(Path(path))
    try:
        return Spec.model_validate(content)
    except ValidationError as error:
        where, said = complaint_at(error, (), content, content)
        if (domain := _domain_elsewhere(content, where)) is not None:
            where = domain
            name = ".".join(map(str, where))
            said = f"`{name}`: must be one value; only those under `compress` and `target` may be a choice or a range"
        line = f", line {line_of(Path(path), where)}" if where else ""
        raise SpecError(f"`{path}`{line}: {said}") from None
    except RecursionError:
        raise SpecError(f"`{path}`: must not contain itself (an anchor refers to what holds it)") from None


def _domain_elsewhere(content: Any, where: Where) -> Where | None:
    """What is written as a choice or a range on the way to `where`, outside of what is searched."""
    if where[:1] in (("compress",), ("target",)) or where[:2] == ("task", "arguments"):
        return None
    for depth, key in enumerate(where):
        try:
            content = content[key]
        except (KeyError, IndexError, TypeError):  # what is wrong is that it is not there
            return None
        if isinstance(content, dict) and ("choice" in content or "range" in content):
            return where[: depth + 1]
    return None
