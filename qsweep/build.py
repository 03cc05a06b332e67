"""A config made real: the compressed model of one trial, and its artifact."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from torch import nn

from qsweep.baseline import baseline, baseline_key, weights_hash
from qsweep.hub.export import float_graph
from qsweep.hub.form import QuantizedModel
from qsweep.spec import Compression, TrialConfig
from qsweep.stage import Context, own_teacher, stage_key
from qsweep.store import Store
from qsweep.tasks import Task, TaskConfig


@dataclass
class Clock:
    """Wall seconds by name."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def context_of(
    config: TaskConfig, task: Task, root: Path, store: Store, seed: int, progress: Callable[[str], None]
) -> Context:
    """The context of a trial's first stage. Its `original()` is made once."""

    @cache
    def original() -> nn.Module:
        return baseline(task, config, root=root, store=store, seed=seed, progress=progress)

    key = baseline_key(config, root, seed)
    if config.own_weights:  # taken from where nobody knows
        key = store.key(key, weights_hash(original()))
    context = Context(
        task=task,
        store=store,
        key=key,
        seed=seed,
        original=original,
        training=config.training,
        progress=progress,
    )
    if own_teacher(task) is None:
        return context
    return replace(context, key=store.key(key, "teacher", weights_hash(context.teacher())))


def compress(config: Compression, model: nn.Module, context: Context, clock: Clock) -> QuantizedModel:
    """`model`, changed in place by the stages of `config` in their order, as the hub form."""
    for later in config.stages()[1:]:
        later.check(context)
    for name, stage in (("prune", config.prune), ("distill", config.distill)):
        if stage is not None:
            context.progress(name)
            with clock(name):
                settled = stage.settled(context)
                model = settled.apply(model, context)
            context = replace(context, key=stage_key(settled, context))
    if config.distill is not None:
        context = replace(context, loss=config.distill.loss(context))
    context.progress("quantize")
    with clock("quantize"):
        return config.quantize.apply(model, context) if config.quantize else float_graph(model, context)


def lower(model: QuantizedModel, config: TrialConfig, artifact: Path, store: Store) -> None:
    """Write the artifact; the folder appears only when it is complete, and nothing is left of one that failed."""
    unfinished = artifact.with_name(artifact.name + ".unfinished")
    for folder in (unfinished, artifact):
        shutil.rmtree(folder, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        config.target.lower(model, unfinished, store)
        os.replace(unfinished, artifact)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
