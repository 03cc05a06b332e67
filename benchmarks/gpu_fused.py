"""A float graph on cuDNN's fused kernels: the best a convolutional network does on a GPU without a compiler."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx

from qsweep.hub.kinds import aten
from qsweep.hub.nodes import arguments, nodes_of, source


def conv_relu(x: Tensor, weight: Tensor, bias: Tensor, *window: Any) -> Tensor:
    """relu(conv(x)); `window`: stride, padding, dilation, groups."""
    return torch.cudnn_convolution_relu(x, weight, bias, *window)


def conv_add_relu(x: Tensor, weight: Tensor, other: Tensor, bias: Tensor, *window: Any) -> Tensor:
    """relu(conv(x) + other)."""
    return torch.cudnn_convolution_add_relu(x, weight, other, 1.0, bias, *window)


def fused(graph: fx.GraphModule) -> fx.GraphModule:
    """A copy of `graph` in which rectifiers, and the sums before them, are joined to the convolutions with a bias that
    nothing else reads."""
    graph = copy.deepcopy(graph)
    order = {node: number for number, node in enumerate(graph.graph.nodes)}
    for relu in nodes_of(graph, {aten.relu.default}):
        given = source(relu)
        if _alone(given):
            _join(graph, relu, given, conv_relu)
        elif given.target is aten.add.Tensor and len(given.users) == 1 and len(given.args) == 2:
            sides = sorted((source(given), source(given, 1)), key=order.__getitem__)
            conv, other = sides[1], sides[0]
            if _alone(conv) and conv is not other:
                _join(graph, relu, conv, conv_add_relu, other)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def _alone(node: fx.Node) -> bool:
    return node.target is aten.conv2d.default and len(node.users) == 1 and arguments(node)["bias"] is not None


def _join(graph: fx.GraphModule, relu: fx.Node, conv: fx.Node, kernel: Any, *other: fx.Node) -> None:
    given = arguments(conv)
    window = [given[name] for name in ("stride", "padding", "dilation", "groups")]
    with graph.graph.inserting_before(relu):
        joined = graph.graph.call_function(kernel, (*conv.args[:2], *other, given["bias"], *window))
    relu.replace_all_uses_with(joined)
