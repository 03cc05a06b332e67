"""Ranges of activations from training samples."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, fx, nn

from qsweep.hub.export import float_graph
from qsweep.hub.form import QuantizedModel
from qsweep.hub.insert import Place, insert_observers
from qsweep.quantize._observers import NearestWeight, RangeObserver
from qsweep.quantize.base import Uniform
from qsweep.stage import Context

_BATCH = 128


def calibrated(config: Uniform, model: nn.Module, context: Context) -> QuantizedModel:
    """The float graph of `model` with observers that have seen the calibration samples.

    What they saw does not depend on bits or scheme, so it is computed once for all trials that share the rest.
    """
    observed = float_graph(model, context)
    insert_observers(observed, lambda place: _range(config, place), lambda place: NearestWeight(config, place))
    if config.activation_bits is None:
        return observed
    seed = context.seed if config.calibration_seed is None else config.calibration_seed

    def compute(folder: Path) -> None:
        observe(observed.graph, calibration_inputs(config, context))
        save_file(ranges(observed.graph), folder / "ranges.safetensors")

    key = context.store.key("ranges", 3, context.key, config.calibration_samples, seed, torch.__version__)
    set_ranges(observed.graph, load_file(context.store.folder(key, compute) / "ranges.safetensors"))
    return observed


def _range(config: Uniform, place: Place) -> RangeObserver | None:
    return RangeObserver(config, place) if config.activation_bits is not None else None


def calibration_inputs(config: Uniform, context: Context) -> Tensor:
    """(`calibration_samples`, ...) float32: training samples drawn without replacement by `calibration_seed`."""
    stored = context.task.samples("train").inputs
    seed = context.seed if config.calibration_seed is None else config.calibration_seed
    drawn = torch.randperm(len(stored), generator=torch.Generator().manual_seed(seed))[: config.calibration_samples]
    return context.task.transform(stored[drawn.sort().values])


@torch.no_grad()
def observe(graph: fx.GraphModule, inputs: Tensor) -> None:
    """Run `inputs` (N, ...) through `graph` in batches."""
    for batch in torch.split(inputs, _BATCH):
        graph(batch)


def ranges(graph: fx.GraphModule) -> dict[str, Tensor]:
    """(2,) lowest and highest value seen, by observer."""
    found = {name: module for name, module in graph.named_modules() if isinstance(module, RangeObserver)}
    return {name: torch.stack([observer.low, observer.high]) for name, observer in found.items()}


def set_ranges(graph: fx.GraphModule, values: dict[str, Tensor]) -> None:
    """Put back what `ranges` gave."""
    for name, (low, high) in values.items():
        observer = graph.get_submodule(name)
        assert isinstance(observer, RangeObserver)
        observer.low.copy_(low)
        observer.high.copy_(high)
