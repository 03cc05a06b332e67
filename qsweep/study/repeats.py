"""Near ties run again: which configs, in which round, with which seed. Nothing here runs or writes anything."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qsweep.records import Record, Repetition
from qsweep.spec import Spec, TrialConfig
from qsweep.study.certainty import Places
from qsweep.study.front import feasible

if TYPE_CHECKING:
    from numpy import ndarray

ROUNDS = 4
"""At most so often is one config repeated."""
_STEP = 1_000_003
"""From the seed of one round to that of the next: far from the seeds that a person tries."""


def budget(spec: Spec) -> int:
    """How many repetitions the sweep may have; one is of what is compressed, on all engines that it is compared on."""
    return spec.search.trials // 10 if spec.search.repeats is None else spec.search.repeats


def due(
    spec: Spec, records: Sequence[Record], round: int, scores: Callable[[Sequence[Record]], Mapping[int, ndarray]]
) -> list[Record]:
    """The records to repeat in this round, the most open first: those whose place is open after the rounds before, and
    with each its likes on other engines, which a mean of several seeds could otherwise not be held against, also those
    that have come since; as many as the budget has left. A round that was cut short is the same round when it is asked
    for again."""
    past = [_before(record, round) for record in records]
    left = budget(spec) - len({(record.compressed, again.round) for record in past for again in record.repetitions})
    if left <= 0:
        return []
    found = Places.of(spec, past, scores(past)).contested()
    wanted = list(dict.fromkeys(record.compressed for record in found if _seeded(record)))
    done = [record for record in records if any(again.round == round for again in record.repetitions)]
    begun = {record.compressed for record in done}  # maybe of a time when the sweep had fewer trials
    new = [network for network in wanted if network not in begun][: max(0, left - len(begun))]
    kept = [network for network in wanted if network in begun.union(new)]
    turns = {network: turn for turn, network in enumerate([*kept, *sorted(begun.difference(kept))])}
    mine = [record for record in records if record.compressed in turns and record not in done]
    open_places = {record.number for record in found}
    compared = [r for r in mine if r.number in open_places or feasible(r, spec.objectives, spec.constraints)]
    return sorted(compared, key=lambda record: turns[record.compressed])


def _before(record: Record, round: int) -> Record:
    """The record as it was before this round."""
    earlier = tuple(again for again in record.repetitions if again.round < round)
    return record.model_copy(update={"repetitions": earlier})


def _seeded(record: Record) -> bool:
    """Whether another seed may give another result: with fp32 and bf16 it would be the same one again."""
    return any(stage.seeded for stage in TrialConfig.model_validate(record.config).compress.stages())


def seed_of(spec: Spec, round: int) -> int:
    """The seed of all repetitions of a round, so that they draw the same samples and stay comparable."""
    return spec.search.seed + _STEP * round


def redrawn(config: Mapping[str, Any], round: int) -> dict[str, Any]:
    """The config with another calibration draw where it fixes its own."""
    changed = copy.deepcopy(dict(config))
    quantize = changed["compress"].get("quantize") or {}
    if quantize.get("calibration_seed") is not None:
        quantize["calibration_seed"] += _STEP * round
    return changed


def with_repetition(record: Record, repetition: Repetition) -> Record:
    """The record after one more repetition; mean and spread of its accuracy follow."""
    repetitions = sorted([*record.repetitions, repetition], key=lambda again: again.round)
    done = [record.metrics, *(again.metrics for again in repetitions if again.failure is None)]
    found = [metrics.accuracy for metrics in done if metrics.accuracy is not None]
    metrics = record.metrics
    if len(found) > 1:
        update = {"accuracy_mean": statistics.fmean(found), "accuracy_spread": statistics.stdev(found)}
        metrics = metrics.model_copy(update=update)
    return record.model_copy(update={"repetitions": tuple(repetitions), "metrics": metrics})
