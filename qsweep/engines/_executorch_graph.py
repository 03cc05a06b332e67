"""The hub form as XNNPACK's patterns know it."""

from __future__ import annotations

import copy
import operator
from typing import Any

import torch
from torch import fx

from qsweep.engines._program import by_rows
from qsweep.engines._torch_graph import over_images
from qsweep.errors import Refused
from qsweep.hub.fixed import with_constants
from qsweep.hub.form import QuantizedModel, grid_of, weight_bits_of
from qsweep.hub.kinds import (
    COMPUTE,
    DEQUANTIZE,
    LINEARS,
    QUANTIZE,
    RECTIFIERS,
    aten,
    keeps_grid,
    quantized,
    rectified,
)
from qsweep.hub.nodes import arguments, attributes, nodes_of, set_constant, source
from qsweep.hub.norm import spell_out_norms
from qsweep.hub.ops import DEQUANTIZE_WEIGHT, QUANTIZE_ROWS
from qsweep.hub.weights import real_weight

_LOW, _HIGH = -128, 127
_LEAST = 15
"""Of thresholds: log(1 + exp(-15)) is 3e-7."""


def for_xnnpack(model: QuantizedModel) -> fx.GraphModule:
    """A copy of the graph of `model` as XNNPACK's patterns of integer kernels are written."""
    graph = with_constants(by_rows(copy.deepcopy(model.graph)))
    for node in nodes_of(graph, {QUANTIZE}):
        _bound(graph, node)
    graph.graph.eliminate_dead_code()
    for layer in nodes_of(graph, COMPUTE):
        if source(layer, 1).target is DEQUANTIZE_WEIGHT:
            _settle(graph, layer)
    for node in nodes_of(graph, {QUANTIZE, DEQUANTIZE}):
        scale, zero_point, *_ = grid_of(node)
        node.args = (node.args[0], scale, zero_point, _LOW, _HIGH, torch.int8)
    for view in nodes_of(graph, {aten.view.default, aten.reshape.default}):
        view.target = aten.view_copy.default
    for rows in nodes_of(graph, {QUANTIZE_ROWS}):
        rows.replace_all_uses_with(source(rows))
    for node in nodes_of(graph, {aten.softplus.default, aten.mish.default}):
        _with_logarithm(graph, node)
    spell_out_norms(graph, model.example)  # it has a convolution in mind for them
    graph.graph.eliminate_dead_code()
    root = torch.nn.Module()  # with nothing but what is read: all of it would be written
    for name, value in attributes(graph):
        set_constant(root, name, value.detach().contiguous())  # constants that lie as images do it mistakes
    return fx.GraphModule(root, graph.graph)


def _bound(graph: fx.GraphModule, node: fx.Node) -> None:
    """The ends of a grid narrower than 8 bits as a rectifier before the quantize op `node`, one with any rectifier that
    is there: XNNPACK's integers have the whole range of int8, and it makes those that it knows bounds of these."""
    scale, zero_point, low, high = grid_of(node)
    value, ends = source(node), ((low - zero_point) * scale, (high - zero_point) * scale)
    if ((low, high) == (_LOW, _HIGH) or keeps_grid(value)) and value.target not in RECTIFIERS - {aten.relu.default}:
        return
    if value.target in RECTIFIERS and len(value.users) == 1:
        own, value = rectified(value), source(value)
        ends = max(ends[0], own[0]), min(ends[1], own[1])
    with graph.graph.inserting_before(node):
        node.update_arg(0, graph.graph.call_function(aten.hardtanh.default, (value, *ends)))


def _settle(graph: fx.GraphModule, layer: fx.Node) -> None:
    """Leave `layer` as it is where it reads integers and gives some, let a linear quantize the rows that it reads
    anew, and give any other its real weight."""
    given, stored = source(layer), source(layer, 1)
    if given.target is DEQUANTIZE and _is_quantized(layer):
        return
    if layer.target in LINEARS and given.target in (DEQUANTIZE, QUANTIZE_ROWS):
        layer.update_arg(0, _rows(graph, given if given.target is DEQUANTIZE else source(given), layer))
        if weight_bits_of(stored) <= 4 and len(stored.users) == 1:  # XNNPACK packs two of these in a byte
            stored.args = (*stored.args[:4], -8, 7, torch.int8)
        return
    name, real = f"{source(stored).target}_real", real_weight(graph, stored)
    flat = layer.target is aten.conv1d.default
    set_constant(graph, name, real.unsqueeze(2) if flat else real)
    with graph.graph.inserting_before(layer):
        layer.update_arg(1, graph.graph.get_attr(name))
    if flat:  # ExecuTorch's own way there takes no real weights beside integers
        with graph.graph.inserting_before(layer):
            image = graph.graph.call_function(aten.unsqueeze.default, (source(layer), 2))
        over_images(graph, layer, image, 2)


def _is_quantized(layer: fx.Node) -> bool:
    """Whether all that reads `layer`, behind its rectifier, is one quantize op."""
    end = layer
    while len(end.users) == 1:
        (end,) = end.users
        if end.target not in RECTIFIERS:
            return end.target is QUANTIZE
    return False


def _with_logarithm(graph: fx.GraphModule, node: fx.Node) -> None:
    """A softplus or mish in ops that XNNPACK has: beside others, of integers, it gives images in the wrong layout.

    log(1 + exp(x)) = max(x, 0) + log(1 + exp(-|x|)), which has no overflow. Raises Refused for a threshold from which
    on a softplus is not its argument to the last bits.
    """
    given, named = source(node), {"beta": 1, "threshold": 20} | arguments(node)
    if (threshold := named["threshold"]) < _LEAST:
        raise Refused(f"ExecuTorch takes `softplus` with a threshold of at least {_LEAST} (got {threshold})")
    beta = named["beta"]
    with graph.graph.inserting_before(node):

        def call(op: Any, *values: Any) -> fx.Node:
            return graph.graph.call_function(op, values)

        value = given if beta == 1 else call(aten.mul.Tensor, given, beta)
        small = call(aten.exp.default, call(aten.neg.default, call(aten.abs.default, value)))
        rest = call(aten.log.default, call(aten.add.Tensor, small, 1.0))
        result = call(aten.add.Tensor, call(aten.relu.default, value), rest)
        if beta != 1:
            result = call(aten.mul.Tensor, result, 1 / beta)
        if node.target is aten.mish.default:
            result = call(aten.mul.Tensor, given, call(aten.tanh.default, result))
    node.replace_all_uses_with(result)


def _rows(graph: fx.GraphModule, value: fx.Node, before: fx.Node) -> fx.Node:
    """`value` (..., K) on a grid for each row, in the ops that XNNPACK knows for this."""
    call, grid = graph.graph.call_function, (_LOW, _HIGH, torch.int8)
    with graph.graph.inserting_before(before):
        fitted = call(quantized.choose_qparams_per_token_asymmetric.default, (value, torch.int8))
        scale, zero_point = (call(operator.getitem, (fitted, i)) for i in range(2))
        integers = call(quantized.quantize_per_token.default, (value, scale, zero_point, *grid))
        return call(quantized.dequantize_per_token.default, (integers, scale, zero_point, *grid, torch.float32))
