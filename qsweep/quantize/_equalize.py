"""Cross-layer equalization: channels of two layers in a row share their range, in float, before anything is rounded."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, fx
from torch.fx.passes.shape_prop import ShapeProp

from qsweep.hub.form import QuantizedModel
from qsweep.hub.kinds import COMPUTE
from qsweep.hub.nodes import constant, nodes_of
from qsweep.quantize._channels import (
    has_own_weight,
    input_maxima,
    output_axis,
    readers,
    replace_constant,
    scale_inputs,
    scale_outputs,
    wide_constant,
)

_SWEEPS = 100
_SETTLED = 1e-4
"""Change of a scale, relative, below which a sweep over all pairs is the last."""
_CONSTANT = 2.0**-8
"""Weights that are a smaller share of their channel's bias make a constant of it: scaled up to the range of others, the
bias would outgrow all activations."""


class Pair(NamedTuple):
    """Two layers the second of which alone reads the first."""

    first: fx.Node
    second: fx.Node


@torch.no_grad()
def equalize(model: QuantizedModel) -> int:
    """Scale the channels between two layers so that both have one range there, in place; returns the number of pairs.

    Channel i of the first layer (weight and bias) is divided by s_i = sqrt(r1_i / r2_i), the weights of the second that
    read it are multiplied by it, r being the largest absolute weight; over all pairs until no scale changes. Exact but
    for float32 rounding. A pair is two convolutions or linears, the second the only reader of the first, with at most
    ReLU, leaky ReLU, pooling or a change of shape between them: ReLU6 and hardtanh do not let a scale pass. Layers that
    share their weight are in no pair; channels that hold zeros alone, or little beside their bias, stay as they are.

    Source: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction" (2019), section 4.1,
    equations 11 to 13.
    """
    with torch.no_grad():
        ShapeProp(model.graph).propagate(model.example)
    found = pairs(model.graph)
    layers = list(dict.fromkeys(layer for pair in found for layer in pair))
    weights = {layer: wide_constant(model.graph, layer, 1) for layer in layers}
    biases = {
        pair.first: wide_constant(model.graph, pair.first, 2) for pair in found if _has_bias(model.graph, pair.first)
    }
    for _ in range(_SWEEPS):
        if max((_balance(pair, weights, biases) for pair in found), default=0.0) < _SETTLED:
            break
    for layer, weight in weights.items():
        replace_constant(model.graph, layer, 1, weight)
    for layer, bias in biases.items():
        replace_constant(model.graph, layer, 2, bias)
    model.graph.graph.eliminate_dead_code()
    model.graph.recompile()
    return len(found)


def pairs(graph: fx.GraphModule) -> list[Pair]:
    """The pairs of `graph`, whose shapes must have been propagated, in order of execution."""
    found = []
    for first in nodes_of(graph, COMPUTE):
        if has_own_weight(graph, first):
            reading = readers(graph, first, output_axis(graph, first))
            if reading is not None and len(reading) == 1:
                found.append(Pair(first, reading[0]))
    return found


def _balance(pair: Pair, weights: dict[fx.Node, Tensor], biases: dict[fx.Node, Tensor]) -> float:
    """Equalize one pair; returns the largest relative change of a scale."""
    given, taken = weights[pair.first].abs().flatten(1).amax(1), input_maxima(pair.second, weights[pair.second])
    bias = biases.get(pair.first, torch.zeros(()))
    scale = (given / taken).sqrt()
    live = scale.isfinite() & (scale > 0) & (given > _CONSTANT * bias.abs())
    scale = torch.where(live, scale, torch.ones_like(scale))
    weights[pair.first] = scale_outputs(weights[pair.first], 1 / scale)
    if pair.first in biases:
        biases[pair.first] = bias / scale
    weights[pair.second] = scale_inputs(pair.second, weights[pair.second], scale)
    return (scale - 1).abs().max().item()


def _has_bias(graph: fx.GraphModule, layer: fx.Node) -> bool:
    return len(layer.args) > 2 and constant(graph, layer.args[2]) is not None
