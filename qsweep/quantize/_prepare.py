"""The float graph before it is calibrated: equalized and smoothed where the config wants it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qsweep.hub.export import quantizable_graph
from qsweep.hub.form import QuantizedModel
from qsweep.quantize._equalize import equalize
from qsweep.quantize._smooth import channel_maxima, smooth
from qsweep.quantize.base import Grids
from qsweep.quantize.ptq import PostTraining
from qsweep.stage import Context


def prepared(config: Grids, model: nn.Module, context: Context, inputs: Callable[[], Tensor]) -> QuantizedModel:
    """The float graph of `model` as `config` wants it before calibration; `inputs()` gives the calibration samples."""
    graph = quantizable_graph(model, context)
    if not isinstance(config, PostTraining):
        return graph
    if config.equalize:
        equalize(graph)
    if config.smooth is not None:

        def compute(folder: Path) -> None:
            save_file(channel_maxima(graph, inputs()), folder / "maxima.safetensors")

        seed = config.draw(context)
        parents = (context.key, config.equalize, config.calibration_samples, seed, torch.__version__)
        key = context.store.key("channel_maxima", 4, *parents)
        smooth(graph, load_file(context.store.folder(key, compute) / "maxima.safetensors"), config.smooth)
    return graph


def preparation(config: Grids) -> tuple[object, ...]:
    """What tells the graph of `prepared` from the plain float graph, for the keys of results that depend on it."""
    if not isinstance(config, PostTraining) or not (config.equalize or config.smooth):
        return ()
    return "equalize", 1, config.equalize, "smooth", 1, config.smooth
