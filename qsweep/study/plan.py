"""What a sweep will do, told before anything runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

from qsweep.config import Config, content_hash
from qsweep.engines import EngineConfig
from qsweep.errors import SpecError
from qsweep.spec import Spec, TrialConfig
from qsweep.study.baselines import baselines
from qsweep.study.points import Candidate, at, candidate, count, drawn, enumerated, listed, targets, tree, unavailable
from qsweep.study.repeats import budget

MOST = 2000
"""Points looked at; of larger spaces so many are drawn."""


class Sharing(Config):
    """A stage that trials share: each distinct one is computed once."""

    stage: str
    distinct: int
    trials: int
    """How many of the configs looked at have it."""


class Refusal(Config):
    """A reason for which configs are not run."""

    reason: str
    configs: int


class Plan(Config):
    """What `qsweep plan` says."""

    configs: int | None
    """Distinct configs in the space, or its points where they are too many to look at; None: not countable, a range of
    real numbers."""
    looked_at: int
    """Configs that the figures below are about: all of them, or as many drawn at random."""
    every_point: bool
    """Whether the sweep runs every config, in order, and the sampler is not asked."""
    trials: int
    """Configs that will be evaluated, at most."""
    repeats: int
    """Evaluations after the last trial, at most, for near ties."""
    baselines: list[str]
    shared: list[Sharing]
    refused: list[Refusal]


def check(spec: Spec) -> None:
    """Raises SpecError for what cannot be run here: engines of which none works, or that of a baseline, a training
    without its GPU, `grid` on an infinite space."""
    enumerated(spec)
    if (reason := spec.task.training.unavailable()) is not None:
        raise SpecError(f"`task.training.device`: {reason}")
    check_engines(spec, unavailable)


def check_engines(spec: Spec, why_not: Callable[[EngineConfig], str | None]) -> list[str]:
    """Why some engines of the space cannot work, by what `why_not` says of each. Raises SpecError where none of them
    can, or not that of a baseline."""
    reasons = [why_not(engine) for engine in targets(spec)]
    told = list(dict.fromkeys(reason for reason in reasons if reason is not None))
    if all(reasons):
        raise SpecError(f"`target.engine`: {'; '.join(told)}")
    for number, config in enumerate(spec.baselines):
        if (reason := why_not(config.target)) is not None:
            raise SpecError(f"`baselines.{number}.target.engine`: {reason}")
    return told


def plan(spec: Spec) -> Plan:
    """Count what `spec` asks for. Runs nothing, imports no engine."""
    size = count(tree(spec))
    points = listed(spec) if size is not None and size <= MOST else drawn(spec, MOST)
    candidates = list(_distinct(candidate(spec, at(point)) for point in islice(points, MOST)))
    possible = [c for c in candidates if c.refusal is None]
    reasons = Counter(c.refusal for c in candidates if c.refusal is not None)
    exact = size is not None and size <= MOST
    most = min(spec.search.trials, len(possible)) if exact else spec.search.trials
    return Plan(
        configs=len(candidates) if exact else size,
        looked_at=len(candidates),
        every_point=enumerated(spec),
        trials=most,
        repeats=budget(spec),
        baselines=_placed(baselines(spec)),
        shared=list(_shared(possible)),
        refused=[Refusal(reason=reason, configs=number) for reason, number in reasons.most_common()],
    )


def _distinct(candidates: Iterable[Candidate]) -> Iterator[Candidate]:
    seen: set[str] = set()
    for one in candidates:
        if one.uid not in seen:
            seen.add(one.uid)
            yield one


def _shared(candidates: list[Candidate]) -> Iterator[Sharing]:
    """How many different results of each stage there are: the stage's config and all that goes before it."""
    for depth, stage in enumerate(("prune", "distill", "quantize"), start=1):
        having = [c.config.compress for c in candidates if c.config and getattr(c.config.compress, stage) is not None]
        parents = ("prune", "distill", "quantize")[:depth]
        keys = {content_hash([_uid(getattr(compress, name)) for name in parents]) for compress in having}
        if having:
            yield Sharing(stage=stage, distinct=len(keys), trials=len(having))


def _placed(configs: Sequence[TrialConfig]) -> list[str]:
    """Each with its engine, and its batch size where there are several."""
    sized = len({config.target.batch_size for config in configs}) > 1
    batches = [f", batch {config.target.batch_size}" if sized else "" for config in configs]
    return [f"{config.name} on {config.target.engine}{batch}" for config, batch in zip(configs, batches, strict=True)]


def _uid(stage: Config | None) -> str | None:
    return stage.uid() if stage is not None else None
