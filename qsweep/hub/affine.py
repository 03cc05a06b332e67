"""Batch norms that no layer takes in, between integers: convolutions of each channel with one number."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from qsweep.hub.kinds import NORMS, aten
from qsweep.hub.nodes import nodes_of, source
from qsweep.hub.norm import affine, replace_weight, stands_alone
from qsweep.hub.ops import LEAST_SCALE
from qsweep.hub.readers import end_of
from qsweep.hub.weights import Channels

_CONVOLUTIONS: dict[int, Any] = {3: aten.conv1d.default, 4: aten.conv2d.default}
_TOP = 127


class Factors(nn.Module):
    """Stores one factor a channel as an integer at the end of its range: the scale is what it was."""

    def forward(self, factors: Tensor) -> Tensor:
        return factors

    def stored(self, weight: Tensor, smallest_scale: Tensor) -> Channels:
        """See `qsweep.hub.insert.WeightObserver`. Of 8 bits, whatever the weights of layers have."""
        scale = weight.abs().flatten() / _TOP
        scale = torch.maximum(torch.where(scale > LEAST_SCALE, scale, 1.0 / _TOP), smallest_scale)
        integers = (weight.flatten() / scale).round().to(torch.int8).reshape(weight.shape)
        return Channels(integers, scale, -_TOP, _TOP)


@torch.no_grad()
def with_norm_layers(graph: fx.GraphModule) -> None:
    """Replace the batch norms that read an observed value, and whose result is only observed, by depthwise
    convolutions of one number with `Factors` on their weights, in place."""
    for norm in nodes_of(graph, NORMS):
        observed = source(norm), *end_of(norm).users
        if stands_alone(norm) and all(node.op == "call_module" for node in observed):
            _replace(graph, norm)
    graph.recompile()


def _replace(graph: fx.GraphModule, norm: fx.Node) -> None:
    factor, shift = (value.float() for value in affine(graph, norm))
    ones = [1] * (len(norm.meta["tensor_meta"].shape) - 2)
    rest = ones, [0] * len(ones), ones, len(factor)
    with graph.graph.inserting_before(norm):
        named = norm.args[1] or norm.args[3]
        layer = graph.graph.call_function(_CONVOLUTIONS[2 + len(ones)], (source(norm), named, None, *rest))
    layer.meta = dict(norm.meta)
    norm.replace_all_uses_with(layer)
    graph.graph.erase_node(norm)
    replace_weight(graph, [layer], factor.reshape(-1, 1, *ones), shift)
    name = f"observe_{layer.name}_weight"
    graph.add_submodule(name, Factors())
    with graph.graph.inserting_before(layer):
        layer.update_arg(1, graph.graph.call_module(name, (source(layer, 1),)))
