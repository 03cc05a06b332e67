"""The hub form as Inductor's patterns know it."""

from __future__ import annotations

import torch
from torch import fx

from qsweep.hub.form import (
    DEQUANTIZE,
    DEQUANTIZE_WEIGHT,
    QUANTIZE,
    arguments,
    aten,
    constant,
    grid_of,
    nodes_of,
    set_constant,
    source,
)


def unsigned(graph: fx.GraphModule) -> fx.GraphModule:
    """The same graph with uint8 activations from 0, which oneDNN's kernels take; in place and exact.

    A grid narrower than 8 bits gets its upper end from a clamp of the integers: Inductor's patterns know the full range
    of uint8 only. (Not a two-sided clamp: one on the output of a convolution is mistaken for its activation function.)
    """
    for node in nodes_of(graph, {QUANTIZE, DEQUANTIZE}):
        scale, zero_point, low, high = grid_of(node)
        node.args = (node.args[0], scale, zero_point - low, 0, 255, torch.uint8)
        if node.target is QUANTIZE and high - low < 255:
            with graph.graph.inserting_after(node):
                bounded = graph.graph.call_function(aten.clamp_max.default, (node, high - low))
            for reader in [user for user in node.users if user is not bounded]:
                reader.replace_input_with(node, bounded)
    graph.recompile()
    return graph


def with_image_convolutions(graph: fx.GraphModule) -> fx.GraphModule:
    """Integer conv1d as conv2d over images one pixel high, in place: Inductor pads a quantized conv1d twice."""
    call = graph.graph.call_function
    for node in nodes_of(graph, {aten.conv1d.default}):
        given, stored = source(node), source(node, 1)
        integers = constant(graph, stored)
        if given.target is not DEQUANTIZE or stored.target is not DEQUANTIZE_WEIGHT or integers is None:
            continue
        set_constant(graph, str(source(stored).target), integers.unsqueeze(2))
        bias, stride, padding, dilation, groups = (arguments(node)[name] for name in _CONVOLUTION)
        sizes = [[first, *size] for first, size in ((1, stride), (0, padding), (1, dilation))]
        with graph.graph.inserting_before(given):
            given.update_arg(0, call(aten.unsqueeze.default, (given.args[0], 2)))
        with graph.graph.inserting_before(node):
            result = call(aten.conv2d.default, (given, stored, bias, *sizes, groups))
            node.replace_all_uses_with(call(aten.squeeze.dim, (result, 2)))
        graph.graph.erase_node(node)
    graph.recompile()
    return graph


_CONVOLUTION = ("bias", "stride", "padding", "dilation", "groups")
