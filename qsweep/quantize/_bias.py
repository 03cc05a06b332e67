"""Empirical bias correction: the mean error that rounding adds to each output channel, taken back by the bias."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from qsweep.errors import NotFinite
from qsweep.hub.convert import convert
from qsweep.hub.form import QuantizedModel, layers_of
from qsweep.hub.kinds import COMPUTE, CONVOLUTIONS
from qsweep.hub.nodes import constant, nodes_of, set_constant, source
from qsweep.hub.norm import own_name
from qsweep.hub.simulate import simulation
from qsweep.quantize._calibrate import calibration_inputs
from qsweep.quantize._channels import replace_constant
from qsweep.quantize._prepare import preparation, prepared
from qsweep.quantize.ptq import PostTraining
from qsweep.stage import Context

_BATCH = 128


@dataclass
class _Batches:
    """One value of the graph for each batch."""

    parts: list[Any]


class _Lockstep(fx.Interpreter):
    """Runs every batch through a node before the next node, so that a layer is corrected before any other reads it.

    Keeps what is still to be read of all samples in memory; one pass instead of one for each layer.
    """

    def __init__(self, graph: fx.GraphModule, layer_done: Callable[[fx.Node, _Batches], None]) -> None:
        super().__init__(graph)
        self.layer_done = layer_done

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.target in COMPUTE and isinstance(result, _Batches):
            self.layer_done(n, result)
        return result

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        found: list[_Batches] = []

        def find(item: Any) -> Any:
            return found.append(item) if isinstance(item, _Batches) else item

        map_aggregate((args, kwargs), find)
        if not found:
            return super().call_function(target, args, kwargs)
        given = (_of_batch((args, kwargs), place) for place in range(len(found[0].parts)))
        return _Batches([super(_Lockstep, self).call_function(target, *arguments) for arguments in given])


def _of_batch(arguments: Any, place: int) -> Any:
    """`arguments` with what one batch has in the place of what all have."""
    return map_aggregate(arguments, lambda item: item.parts[place] if isinstance(item, _Batches) else item)


def correct(config: PostTraining, model: nn.Module, context: Context, observed: QuantizedModel) -> None:
    """`correct_biases` of `observed`, made from `model`, on the calibration samples of `config`; in place."""
    inputs = calibration_inputs(config, context)

    def compute(folder: Path) -> None:
        original = prepared(config, model, context, lambda: inputs)
        save_file(mean_outputs(original, inputs), folder / "means.safetensors")

    seed = config.draw(context)
    parents = (context.key, config.calibration_samples, seed, torch.__version__, *preparation(config))
    folder = context.store.folder(context.store.key("mean_outputs", 4, *parents), compute)
    correct_biases(observed, load_file(folder / "means.safetensors"), inputs)


@torch.no_grad()
def mean_outputs(model: QuantizedModel, inputs: Tensor) -> dict[str, Tensor]:
    """(C,) float64 mean of each output channel of every layer over `inputs` (N, ...), by node."""
    means: dict[str, Tensor] = {}
    layers = {*layers_of(model.graph)}

    def keep(node: fx.Node, outputs: _Batches) -> None:
        if node in layers:
            means[node.name] = _mean(node, outputs)

    _Lockstep(model.graph, keep).run(_Batches(list(torch.split(inputs, _BATCH))))
    return means


@torch.no_grad()
def correct_biases(model: QuantizedModel, expected: dict[str, Tensor], inputs: Tensor) -> None:
    """Add E[W x] - E[W_q x_q] over `inputs` (N, ...) to the bias of each layer, in place and in order of execution.

    `model`: observed and not yet converted. `expected`: `mean_outputs` of the float graph. W_q are the weights as they
    will be stored, x_q what the layer reads when everything before it is quantized and corrected. A layer without bias
    gets one. Raises NotFinite where a weight, or a mean, is not.

    Source: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction" (2019), section 4.2;
    the empirical form of Nagel et al., "A White Paper on Neural Network Quantization" (2021), section 3.3.
    """
    stored = simulation(convert(copy.deepcopy(model)))
    corrections: dict[str, Tensor] = {}

    def correct(node: fx.Node, outputs: _Batches) -> None:
        if node.name not in expected:
            return  # a norm that has become a layer, or its weights follow from the input
        shift = expected[node.name] - _mean(node, outputs)
        if not shift.isfinite().all():
            raise NotFinite(f"`{node.name}`: a mean output is NaN or infinite on the calibration samples")
        corrections[node.name] = shift
        for part in outputs.parts:
            part += _along_channels(node, shift.float(), part)

    _Lockstep(stored, correct).run(_Batches(list(torch.split(inputs, _BATCH))))
    for node in nodes_of(model.graph, COMPUTE):
        if node.name in corrections:
            _add_to_bias(model.graph, node, corrections[node.name])
    model.graph.graph.eliminate_dead_code()
    model.graph.recompile()


def _mean(node: fx.Node, outputs: _Batches) -> Tensor:
    channels = [part.movedim(1 if node.target in CONVOLUTIONS else -1, 0).flatten(1) for part in outputs.parts]
    total = torch.stack([part.sum(1, dtype=torch.float64) for part in channels]).sum(0)
    mean: Tensor = total / max(1, sum(part.shape[1] for part in channels))
    return mean


def _along_channels(node: fx.Node, values: Tensor, outputs: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (outputs.dim() - 2)) if node.target in CONVOLUTIONS else values


def _add_to_bias(graph: fx.GraphModule, node: fx.Node, shift: Tensor) -> None:
    bias = constant(graph, node.args[2]) if len(node.args) > 2 else None
    if bias is not None:
        return replace_constant(graph, node, 2, bias.detach().double() + shift)
    weight = source(node, 1)
    if weight.op == "call_module":  # an observer
        weight = source(weight)
    name = str(weight.target)
    name = own_name(graph, f"{name.removesuffix('weight')}bias" if name.endswith("weight") else f"{name}_bias", node)
    set_constant(graph, name, shift.float())
    with graph.graph.inserting_before(node):
        node.args = (*node.args[:2], graph.graph.get_attr(name), *node.args[3:])
