"""The step of post-training quantization that chooses weights' levels by what layers give; its results are kept."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, fx

from qsweep.hub.form import QuantizedModel
from qsweep.hub.kinds import COMPUTE
from qsweep.hub.nodes import nodes_of, set_constant, source
from qsweep.hub.norm import own_name
from qsweep.quantize._adaround import adaround
from qsweep.quantize._arithmetic import WeightLevels
from qsweep.quantize._calibrate import calibration_inputs
from qsweep.quantize._gptq import gptq
from qsweep.quantize._layerwise import Rounded, Rounding, rounded_layers
from qsweep.quantize._observers import NearestWeight
from qsweep.quantize._prepare import preparation
from qsweep.quantize.ptq import PostTraining
from qsweep.quantize.rounding import AdaRound
from qsweep.stage import Context

_MOST_SAMPLES = 1024
_MEMORY = 512 * 2**20
"""Bytes that the values of both models may take; eight of the largest live at once in a network with shortcuts."""


def round_weights(config: PostTraining, model: QuantizedModel, context: Context) -> None:
    """Replace the weights of the calibrated `model` by levels that `config.rounding` chose, in place.

    Computed once for all trials that differ in later steps only. Raises NotFinite for weights and activations that are
    not.
    """

    def compute(folder: Path) -> None:
        generator = torch.Generator().manual_seed(context.seed)
        inputs = _subset(calibration_inputs(config, context), model)
        _save(rounded_layers(model, inputs, _rounding(config), generator, context.progress), folder)

    same = config.model_copy(update={"bias_correction": False})
    parents = (context.key, same.uid(), *preparation(config), context.seed, torch.__version__)
    key = context.store.key("rounded", 6, *parents)
    set_rounded(model.graph, _load(context.store.folder(key, compute)))


def _rounding(config: PostTraining) -> Rounding:
    if isinstance(config.rounding, AdaRound):
        iterations = config.rounding.iterations
        return lambda layer, generator: adaround(layer, iterations, generator)
    return gptq


def _subset(inputs: Tensor, model: QuantizedModel) -> Tensor:
    """As many of `inputs` (N, ...), evenly drawn, as fit the memory."""
    shapes = [node.meta["tensor_meta"].shape for node in model.graph.graph.nodes if _is_tensor(node)]
    largest = max(shape.numel() for shape in shapes) * 4 / len(model.example)
    count = max(2, min(_MOST_SAMPLES, int(_MEMORY / (8 * largest))))
    return inputs if len(inputs) <= count else inputs[torch.linspace(0, len(inputs) - 1, count).long()]


def _is_tensor(node: fx.Node) -> bool:
    return hasattr(node.meta.get("tensor_meta"), "shape") and node.op != "get_attr"


def set_rounded(graph: fx.GraphModule, rounded: dict[str, Rounded]) -> None:
    """Put rounded weights in their layers, and their levels in the layers' observers, in place."""
    for node in nodes_of(graph, COMPUTE):
        if node.name not in rounded:
            continue
        chosen, observed = rounded[node.name], source(node, 1)
        original = str(source(observed).target)
        name = own_name(graph, original, *observed.users)
        set_constant(graph, name, chosen.levels.real(chosen.integers))
        if name != original:
            with graph.graph.inserting_before(observed):
                observed.update_arg(0, graph.graph.get_attr(name))
        observer = graph.get_submodule(str(observed.target))
        assert isinstance(observer, NearestWeight)
        observer.levels = chosen.levels
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _save(rounded: dict[str, Rounded], folder: Path) -> None:
    tensors: dict[str, Tensor] = {}
    for name, found in rounded.items():
        levels = found.levels
        ends = torch.tensor([levels.low, levels.high])
        parts = {"integers": found.integers.to(torch.int16), "scale": levels.scale, "zero_point": levels.zero_point}
        tensors |= {f"{name}.{part}": value.clone().contiguous() for part, value in (parts | {"ends": ends}).items()}
    save_file(tensors, folder / "rounded.safetensors")


def _load(folder: Path) -> dict[str, Rounded]:
    stored = load_file(folder / "rounded.safetensors")
    found = {}
    for name in (key.removesuffix(".ends") for key in stored if key.endswith(".ends")):
        low, high = stored[f"{name}.ends"].tolist()
        levels = WeightLevels(stored[f"{name}.scale"], stored[f"{name}.zero_point"], low, high)
        found[name] = Rounded(stored[f"{name}.integers"].float(), levels)
    return found
