"""The hub form as XNNPACK's patterns know it."""

from __future__ import annotations

import operator

import torch
from torch import fx

from qsweep.engines._program import by_rows
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
from qsweep.hub.nodes import arguments, nodes_of, set_constant, source
from qsweep.hub.ops import DEQUANTIZE_WEIGHT, QUANTIZE_ROWS
from qsweep.hub.weights import real_weight

_LOW, _HIGH = -128, 127


def for_xnnpack(model: QuantizedModel) -> fx.GraphModule:
    """The graph of `model` as XNNPACK's patterns of integer kernels are written, in place."""
    graph = with_constants(by_rows(model.graph))
    for node in nodes_of(graph, {QUANTIZE}):
        _bound(graph, node)
    graph.graph.eliminate_dead_code()
    for layer in nodes_of(graph, COMPUTE):
        if source(layer, 1).target is DEQUANTIZE_WEIGHT:
            _settle(graph, layer)
    for node in nodes_of(graph, {QUANTIZE, DEQUANTIZE}):
        scale, zero_point, *_ = grid_of(node)
        node.args = (node.args[0], scale, zero_point, _LOW, _HIGH, torch.int8)
    for rows in nodes_of(graph, {QUANTIZE_ROWS}):
        rows.replace_all_uses_with(source(rows))
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def _bound(graph: fx.GraphModule, node: fx.Node) -> None:
    """The ends of a grid narrower than 8 bits as a rectifier before the quantize op `node`: XNNPACK's integers have the
    whole range of int8, and it makes rectifiers bounds of these."""
    scale, zero_point, low, high = grid_of(node)
    value = source(node)
    if (low, high) == (_LOW, _HIGH) or keeps_grid(value):
        return
    ends = (low - zero_point) * scale, (high - zero_point) * scale
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
    name = f"{source(stored).target}_real"
    set_constant(graph, name, real_weight(graph, stored))
    with graph.graph.inserting_before(layer):
        layer.update_arg(1, graph.graph.get_attr(name))


def _is_quantized(layer: fx.Node) -> bool:
    """Whether all that reads `layer`, behind its rectifier, is one quantize op."""
    end = layer
    while len(end.users) == 1:
        (end,) = end.users
        if end.target not in RECTIFIERS:
            return end.target is QUANTIZE
    return False


def _rows(graph: fx.GraphModule, value: fx.Node, before: fx.Node) -> fx.Node:
    """`value` (..., K) on a grid for each row, in the ops that XNNPACK knows for this."""
    call, grid = graph.graph.call_function, (_LOW, _HIGH, torch.int8)
    with graph.graph.inserting_before(before):
        fitted = call(quantized.choose_qparams_per_token_asymmetric.default, (value, torch.int8))
        scale, zero_point = (call(operator.getitem, (fitted, i)) for i in range(2))
        integers = call(quantized.quantize_per_token.default, (value, scale, zero_point, *grid))
        return call(quantized.dequantize_per_token.default, (integers, scale, zero_point, *grid, torch.float32))
