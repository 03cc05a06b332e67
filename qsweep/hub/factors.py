"""Constant factors of what a layer gives as a part of the layer."""

from __future__ import annotations

import math
from typing import Any

from torch import fx

from qsweep.hub.fixed import fixed_nodes
from qsweep.hub.kinds import CONVOLUTIONS, LINEARS, NORMS, aten
from qsweep.hub.nodes import arguments, nodes_of, source
from qsweep.hub.traced import replace_by, shape_of


def with_factors(graph: fx.GraphModule) -> None:
    """Let layers and norms multiply by the constants behind them, one for all or one a channel, in place.

    Such as the scales of branches in ConvNeXt, CaiT and DINOv2: what is added to a shortcut is then a layer's result.
    What is subtracted is a layer's with its sign turned around, and sums of layers take a factor each. A layer whose
    weights others read, too, keeps them.
    """
    fixed = fixed_nodes(graph)
    (before,) = (node for node in graph.graph.nodes if node.op == "placeholder")
    for node in fixed:  # a factor may be made after the layer
        before.append(node)
        before = node
    _with_turned_signs(graph, fixed)
    for node in nodes_of(graph, {aten.mul.Tensor}):
        values = [value for value in node.all_input_nodes if value not in fixed]
        factors = [given for given in node.args if given not in values]
        if len(values) != 1 or len(factors) != 1 or node.kwargs:
            continue
        layers = _layers(values[0], _axis(values[0], factors[0]), fixed)
        for layer in layers:
            fixed |= dict.fromkeys(_scale(graph, layer, factors[0]))
        if layers:
            node.replace_all_uses_with(values[0])
            graph.graph.erase_node(node)


def _with_turned_signs(graph: fx.GraphModule, fixed: dict[fx.Node, None]) -> None:
    """Sums with the negative of what layers give for differences, in place."""
    call = graph.graph.call_function
    for node in nodes_of(graph, {aten.sub.Tensor}):
        values = [value for value in node.all_input_nodes if value not in fixed]
        if len(values) == len(node.args) == 2 and not node.kwargs and _layers(values[1], -1, fixed):
            with graph.graph.inserting_before(node):
                turned = call(aten.mul.Tensor, (values[1], -1.0))
                turned.meta["val"] = values[1].meta["val"]
                replace_by(node, call(aten.add.Tensor, (values[0], turned)))
            graph.graph.erase_node(node)


def _layers(value: fx.Node, axis: int | None, fixed: dict[fx.Node, None]) -> list[fx.Node]:
    """The layers whose results, added up, are `value`; none where one of them takes no factor along `axis`."""
    value, axis = _behind(value, axis)
    if axis is None:
        return []
    if value.target is not aten.add.Tensor:
        return [value] if _takes(value, axis, fixed) else []
    parts = value.all_input_nodes
    alone = len(value.users) == 1 and len(parts) == len(value.args) == 2 and not value.kwargs
    shape = shape_of(value)
    if not alone or shape is None or any(part in fixed or shape_of(part) != shape for part in parts):
        return []
    found = [_layers(part, axis, fixed) for part in parts]
    return [layer for layers in found for layer in layers] if all(found) else []


def _axis(value: fx.Node, factor: Any) -> int | None:
    """The dimension of `value` along which `factor` differs, -1 where it is one number; None where it differs along
    several, or repeats `value`, or nobody knows."""
    if not isinstance(factor, fx.Node):
        return -1
    if "val" not in factor.meta or "val" not in value.meta:
        return None
    sizes, shape = factor.meta["val"].shape, value.meta["val"].shape
    if len(sizes) > len(shape):
        return None
    if math.prod(sizes) == 1:
        return -1
    wide = [place for place, size in enumerate(sizes, len(shape) - len(sizes)) if size != 1]
    return wide[0] if len(wide) == 1 and shape[wide[0]] == math.prod(sizes) else None


def _behind(value: fx.Node, axis: int | None) -> tuple[fx.Node, int | None]:
    """What gives `value` before its dimensions were put in another order, and the place of `axis` there."""
    while len(value.users) == 1 and value.target in {aten.permute.default, aten.transpose.int} and "val" in value.meta:
        given, order = arguments(value), list(range(value.meta["val"].dim()))
        if value.target is aten.permute.default:
            order = [order[dim] for dim in given["dims"]]
        else:
            one, other = given["dim0"], given["dim1"]
            order[one], order[other] = order[other], order[one]
        axis = order[axis] if axis is not None and axis >= 0 else axis
        value = source(value)
    return value, axis


def _takes(layer: fx.Node, axis: int, fixed: dict[fx.Node, None]) -> bool:
    """Whether `layer` alone has its weights, its channels are `axis`, and nothing else reads what it gives."""
    if layer.target not in CONVOLUTIONS | LINEARS | NORMS or len(layer.users) > 1 or 1 not in _places(layer):
        return False
    weights, rank = [source(layer, place) for place in _places(layer)], layer.meta["val"].dim()
    names = {each.target for each in weights if each.op == "get_attr"}
    read = [node for node in fixed if node.op == "get_attr" and node.target in names]
    shared = len(read) > len(names) or any(len(node.users) > 1 for node in weights)
    if shared or not fixed.keys() >= {*weights}:
        return False
    if layer.target in CONVOLUTIONS and rank != source(layer, 1).meta["val"].dim():
        return False  # of one sample
    return axis in (-1, rank - 1 if layer.target in LINEARS else 1)


def _places(layer: fx.Node) -> list[int]:
    """Of weight and bias among the arguments of `layer`, which are all that scales what it gives."""
    return [place for place in (1, 2) if place < len(layer.args) and layer.args[place] is not None]


def _scale(graph: fx.GraphModule, layer: fx.Node, factor: Any) -> list[fx.Node]:
    """Returns its new weight and bias."""
    call, found = graph.graph.call_function, []
    for place in _places(layer):
        weight = source(layer, place)
        with graph.graph.inserting_before(layer):
            each = factor
            if isinstance(factor, fx.Node):
                numbers = factor.meta["val"].numel()
                shape = [numbers, *[1] * (weight.meta["val"].dim() - 1)] if numbers > 1 else []
                each = call(aten.reshape.default, (factor, shape))
            scaled = call(aten.mul.Tensor, (weight, each))
        scaled.meta["val"] = weight.meta["val"]
        layer.update_arg(place, scaled)
        found.append(scaled)
    return found
