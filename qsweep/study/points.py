"""The points of a spec's space: how many, which, and how a point becomes a config."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from qsweep.config import content_hash
from qsweep.domains import Choice, Domain, Range, Suggest, assignments, behind, resolve
from qsweep.engines import Engine, EngineConfig
from qsweep.errors import SpecError
from qsweep.machine import cores
from qsweep.space import complaint
from qsweep.spec import Spec, TrialConfig

Point = dict[str, Any]
"""A suggested value for each path asked about."""


def tree(spec: Spec) -> dict[str, Any]:
    """What is searched, as one tree: paths begin with `compress.` and `target.`."""
    return {"compress": spec.compress.tree, "target": spec.target.tree}


def count(node: Any) -> int | None:
    """Number of points of a tree; None where a range of real numbers makes it infinite."""
    if isinstance(node, Range):
        return len(node.values) if node.values is not None else None
    if not isinstance(node, Choice | dict | list):
        return 1
    children = node.options if isinstance(node, Choice) else node.values() if isinstance(node, dict) else node
    counts = [count(child) for child in children]
    finite = [n for n in counts if n is not None]
    if len(finite) < len(counts):
        return None
    return sum(finite) if isinstance(node, Choice) else math.prod(finite)


@dataclass(frozen=True)
class Candidate:
    """A point as it may be evaluated, or why it may not."""

    plain: dict[str, Any]
    """The TrialConfig as plain data, complete where it is valid."""
    config: TrialConfig | None
    refusal: str | None
    """Why it cannot be run: the engine refuses it, or its values do not go together."""
    uid: str

    @property
    def name(self) -> str:
        return self.config.name if self.config else "invalid"

    @property
    def simulated(self) -> bool:
        return self.config is not None and self.config.simulated

    @property
    def engine(self) -> str:
        return self.config.target.engine if self.config else str(self.plain["target"].get("engine", ""))


def candidate(spec: Spec, suggest: Suggest) -> Candidate:
    """The point that `suggest` describes."""
    return read(resolve(tree(spec), suggest))


def read(plain: dict[str, Any]) -> Candidate:
    """What a config as plain data is here and now."""
    try:
        config = TrialConfig.model_validate(plain)
    except ValidationError as error:
        return Candidate(plain, None, complaint(error, content=plain), content_hash(plain))
    return accepted(config, unavailable(config.target) or config.target.refuses(config.compress))


def unavailable(engine: EngineConfig) -> str | None:
    """Why `engine` cannot work on this machine, or not as it is asked to be measured, or None."""
    return _not_here(engine, engine.available()) or crowded(engine)


def crowded(engine: EngineConfig) -> str | None:
    """Why this machine has too few cores for `engine`, or None."""
    most = f"`threads` must be at most {cores()}, the cores that may be used (got {engine.threads})"
    return _not_here(engine, most if engine.threads > cores() else None)


def _not_here(engine: EngineConfig, reason: str | None) -> str | None:
    return reason and f"`{engine.engine}` does not work on this machine: {reason}"


def working(spec: Spec) -> list[EngineConfig]:
    """Those of `targets` that work on this machine."""
    return [engine for engine in targets(spec) if unavailable(engine) is None]


def accepted(config: TrialConfig, refusal: str | None = None) -> Candidate:
    return Candidate(config.model_dump(mode="json"), config, refusal, config.uid())


def at(point: Point) -> Suggest:
    """Suggest the values of `point`."""
    return lambda path, domain: point[path]


def enumerated(spec: Spec) -> bool:
    """Whether the sweep runs all points in their order: asked for by `grid`, or because they are so few."""
    size = count(tree(spec))
    if spec.search.sampler == "grid" and size is None:
        raise SpecError(
            "`search.sampler`: `grid` must have a space without ranges of real numbers; give each range a `step`, "
            "use `choice`, or take another sampler"
        )
    return spec.search.sampler == "grid" or (size is not None and size <= spec.search.trials)


def listed(spec: Spec) -> Iterator[Point]:
    """Every point of a countable space, in order."""
    return assignments(tree(spec))


def drawn(spec: Spec, number: int) -> Iterator[Point]:
    """`number` points drawn evenly from each domain, always the same ones."""
    source = random.Random(spec.search.seed)
    for _ in range(number):
        point: Point = {}

        def draw(path: str, domain: Domain, point: Point = point) -> Any:
            if domain.values is not None:
                point[path] = source.choice(domain.values)
            else:
                assert isinstance(domain, Range)
                point[path] = _between(source, domain)
            return point[path]

        resolve(tree(spec), draw)
        yield point


def _between(source: random.Random, domain: Range) -> float:
    if domain.log:
        return math.exp(source.uniform(math.log(domain.low), math.log(domain.high)))
    return source.uniform(domain.low, domain.high)


def asks_for(spec: Spec, target: dict[str, Any]) -> bool:
    """Whether `target`, an engine config as plain data, is one of the spec's."""
    try:
        uid = TypeAdapter[EngineConfig](Engine).validate_python(target).uid()
    except ValidationError:  # of another version of the code
        return False
    points = behind(spec.target.tree, target, spec.target.path)
    return any(spec.target.sample(at(point)).uid() == uid for point in points)


def targets(spec: Spec, most: int = 8) -> list[Any]:
    """The engine options of a spec as configs; the first ones of each engine where there are too many."""
    size = count(spec.target.tree)
    if size is not None and size <= most:
        return [spec.target.sample(at(point)) for point in assignments(spec.target.tree, spec.target.path)]
    found: dict[str, Any] = {}
    for engine in itertools.islice(spec.target.configs(), 1000):
        found.setdefault(engine.engine, engine)
    return list(found.values())
