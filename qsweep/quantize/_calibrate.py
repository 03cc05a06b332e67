"""Ranges of activations from training samples."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, fx, nn

from qsweep.errors import DataError, NotFinite
from qsweep.hub.form import QuantizedModel
from qsweep.hub.insert import OF_LAYERS, insert_observers
from qsweep.quantize._observers import NearestWeight, RangeObserver, activation_observer, apart, embedding_observer
from qsweep.quantize._prepare import preparation, prepared
from qsweep.quantize._ranges import BINS
from qsweep.quantize.base import Grids, Uniform
from qsweep.stage import Context

_BATCH = 128


def calibrated(config: Uniform, model: nn.Module, context: Context) -> QuantizedModel:
    """The float graph of `model` with observers that have seen the calibration samples.

    What they saw does not depend on bits or scheme, so it is computed once for all trials that share the rest.
    """
    observed = prepared(config, model, context, lambda: calibration_inputs(config, context))
    config.check_layers(observed.layers(), observed.recurrent_weights)
    insert_observers(
        observed,
        lambda place: activation_observer(config, place),
        lambda place: NearestWeight(config, place),
        lambda: embedding_observer(config),
        apart=lambda place: apart(config, place),
        real=config.stays_float,
        layers_only=config.activation_mode != "static",
    )
    found = list(_observers(observed.graph).values())
    if not found:
        return observed

    def statistics(what: str, run: Callable[[fx.GraphModule, Tensor], None]) -> dict[str, Tensor]:
        def compute(folder: Path) -> None:
            run(observed.graph, calibration_inputs(config, context))
            save_file(_statistics(observed.graph), folder / "statistics.safetensors")

        floats = ["float", *config.canonical().float_layers] if config.float_layers else []
        parents = (context.key, config.calibration_samples, seed, torch.__version__, *preparation(config), *floats)
        folder = context.store.folder(context.store.key(what, 10, BINS, *parents), compute)
        return load_file(folder / "statistics.safetensors")

    seed = config.draw(context)
    _restore(observed.graph, statistics("ranges", see_extremes))
    if any(observer.counts_values for observer in found):
        _restore(observed.graph, statistics("histograms", see_counts))
    for observer in found:
        observer.fit()
    return observed


def calibration_inputs(config: Grids, context: Context) -> Tensor:
    """(`calibration_samples`, ...) float32: training samples drawn without replacement by `calibration_seed`;
    all of them if there are fewer. Raises DataError if there are none."""
    return training_inputs(context, config.calibration_samples, config.draw(context))


def training_inputs(context: Context, count: int, seed: int) -> Tensor:
    """(count, ...) as `calibration_inputs`, for who has no config of it."""
    stored = context.task.samples("train").inputs
    if not len(stored):
        raise DataError("`train`: must hold samples to calibrate on (got none)")
    drawn = torch.randperm(len(stored), generator=torch.Generator().manual_seed(seed))[:count]
    return context.task.transform(stored[drawn.sort().values])


def observe(graph: fx.GraphModule, inputs: Tensor) -> None:
    """Fit the range of every observer in `graph`, in place, to `inputs` (N, ...).

    Raises DataError for no samples, NotFinite for activations that are NaN or infinite.
    """
    see_extremes(graph, inputs)
    found = _observers(graph).values()
    if any(observer.counts_values for observer in found):
        see_counts(graph, inputs)
    for observer in found:
        observer.fit()


def see_extremes(graph: fx.GraphModule, inputs: Tensor) -> None:
    """The first pass: the smallest and largest values. Raises as `observe`."""
    _run(graph, inputs)
    for name, observer in _observers(graph).items():
        if not (observer.low.isfinite() and observer.high.isfinite()):
            value = name.removeprefix("observe_").split(".")[0]
            read = f", read by `{observer.readers[0]}`" if observer.readers else ""
            raise NotFinite(f"`{value}`{read}: an activation is NaN or infinite on the calibration samples")


def see_counts(graph: fx.GraphModule, inputs: Tensor) -> None:
    """The second pass: values counted between the extremes of the first one."""
    for observer in _observers(graph).values():
        observer.begin_counting()
    _run(graph, inputs)


@torch.no_grad()
def _run(graph: fx.GraphModule, inputs: Tensor) -> None:
    for batch in torch.split(inputs, _BATCH):
        graph(batch)


def _observers(graph: fx.GraphModule) -> dict[str, RangeObserver]:
    """By name, in order of execution."""
    return {name: module for name, module in graph.named_modules() if isinstance(module, RangeObserver)}


def _statistics(graph: fx.GraphModule) -> dict[str, Tensor]:
    """By name, without those that see what another one sees: the same for all bits."""
    return {name: observer.statistics for name, observer in _observers(graph).items() if not name.endswith(OF_LAYERS)}


def _restore(graph: fx.GraphModule, values: dict[str, Tensor]) -> None:
    for name, observer in _observers(graph).items():
        observer.statistics = values[name.removesuffix(OF_LAYERS)]
