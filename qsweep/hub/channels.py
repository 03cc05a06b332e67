"""Channels followed through a graph, op by op.

Source: Fang et al., "DepGraph: Towards Any Structural Pruning" (2023), here on a traced graph: a channel is followed
from the rows of the weights that give it to the columns of those that read it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import fx
from torch.fx.passes.shape_prop import ShapeProp

from qsweep.hub.coupling import PINNED, Coupling, Role, Value, Walk, place_of, size_at
from qsweep.hub.form import QuantizedModel
from qsweep.hub.heads import ALONG, ATTENTION, MOVES, along_others, attention, moved, split
from qsweep.hub.kinds import CONVOLUTIONS, LINEARS, NEAREST, NORMS, POINTWISE, POOLS, RECTIFIERS, SIZE, TRANSPOSED, aten
from qsweep.hub.nodes import arguments, constant, shape_seen, source

_SUMS = {aten.add.Tensor, aten.sub.Tensor}
_PRODUCTS = {aten.mul.Tensor, aten.div.Tensor}
_WINDOWS = POOLS | {
    aten.max_pool1d.default,
    aten.max_pool2d.default,
    aten.avg_pool1d.default,
    aten.adaptive_avg_pool1d.default,
    aten.adaptive_max_pool2d.default,
    aten.upsample_bilinear2d.vec,
    NEAREST,
}
_OVER_DIMENSIONS = {aten.mean.dim, aten.sum.dim_IntList, aten.amax.default}
_OF_NORMS: tuple[Role, ...] = "gives", "shifts", "follows", "follows"
"""The parts of a norm: factors, summands, means, variances."""
_COPIES = {aten.clone.default, aten.contiguous.default}
_RESHAPES = {aten.reshape.default, aten.flatten.using_ints, aten.squeeze.dim, aten.unsqueeze.default}


def couple(model: QuantizedModel) -> Coupling:
    """Follow the channels of `model`, a float graph."""
    ShapeProp(model.graph).propagate(model.example)
    walk = Walk(model.graph)
    for node in model.graph.graph.nodes:
        rule = _RULES.get(node.target) if node.op == "call_function" else None
        value = rule(walk, node) if rule else None
        if value is not None:
            walk.values[node] = value
        elif node.target is not SIZE:
            for given in node.all_input_nodes:
                walk.pin(given)
    return walk.coupling()


def _layer(walk: Walk, node: fx.Node) -> Value | None:
    given, weight, bias = source(node), source(node, 1), arguments(node)["bias"]
    if not all(part is None or part.op == "get_attr" for part in (weight, bias)):
        return None
    axis = len(shape_seen(given)) - 1 if node.target in LINEARS else 1
    groups, outputs = arguments(node).get("groups", 1), shape_seen(node)[axis]
    row = row_dim(node)
    if groups == 1:
        walk.claim(node, weight, 1 - row, _read(walk, node, axis), "reads")
        channels = walk.fresh(outputs)
    elif node.target in TRANSPOSED:
        return None
    elif is_depthwise(node):
        value = walk.values.get(given)
        channels = [PINNED] * outputs
        if value is not None and value.axis == axis:
            channels = [channel for channel in value.channels for _ in range(outputs // groups)]
    else:  # groups stay equal: what is taken out of one is taken out of all
        read = _read(walk, node, axis)
        first = read[: len(read) // groups]
        walk.union.join(read, first * groups)
        walk.claim(node, weight, 1, first, "reads")
        channels = walk.fresh(outputs // groups) * groups
    walk.claim(node, weight, row, channels, "gives")
    walk.claim(node, bias, 0, channels, "shifts")
    return Value(axis, channels)


def _read(walk: Walk, node: fx.Node, axis: int) -> list[int]:
    """The channels along `axis` of what `node` reads, which it sums up: those that do not become 0 are pinned."""
    given = source(node)
    value = walk.values.get(given)
    if value is None or value.axis != axis:
        walk.pin(given)
        return [PINNED] * shape_seen(given)[axis]
    if not value.silent:
        walk.pin(given)
    return value.channels


def row_dim(layer: fx.Node) -> int:
    """The dimension of the weight of `layer` that has an entry for each channel it gives."""
    return 1 if layer.target in TRANSPOSED else 0


def is_depthwise(node: fx.Node) -> bool:
    """Whether each channel that the convolution `node` reads is a group of its own, of several."""
    groups = int(arguments(node).get("groups", 1))
    return 1 < groups == shape_seen(source(node))[1]


def _norm(walk: Walk, node: fx.Node) -> Value | None:
    value, parts = walk.values.get(source(node)), node.args[1:5]
    known = all(part is None or cast(fx.Node, part).op == "get_attr" for part in parts)
    if value is None or value.axis != 1 or not known:
        return None
    for part, role in zip(parts, _OF_NORMS, strict=True):
        walk.claim(node, part, 0, value.channels, role)
    return Value(1, value.channels, silent=None not in parts[:2])


def _pointwise(walk: Walk, node: fx.Node) -> Value | None:
    value = walk.values.get(source(node))
    if value is None:
        return None
    of_zero = cast(Any, node.target)(torch.zeros(()), *node.args[1:], **node.kwargs)
    return Value(value.axis, value.channels, value.silent and not bool(of_zero))


def _slope(walk: Walk, node: fx.Node) -> Value | None:
    """Of a rectifier that has learned a slope below 0, one number or one for each channel: it gives 0 for 0."""
    value, slope = walk.values.get(source(node)), constant(walk.graph, node.args[1])
    if value is None or slope is None or (slope.numel() > 1 and value.axis != 1):
        return None
    if slope.numel() > 1:
        walk.claim(node, source(node, 1), 0, value.channels, "follows")
    return value


def _same(walk: Walk, node: fx.Node) -> Value | None:
    return walk.values.get(source(node))


def _windows(walk: Walk, node: fx.Node) -> Value | None:
    value = walk.values.get(source(node))
    return value if value is not None and value.axis == 1 and len(shape_seen(node)) > 2 else None


def _elements(walk: Walk, node: fx.Node) -> Value | None:
    """Sums and products element by element: both sides have the same channels."""
    given = [argument for argument in node.args[:2] if isinstance(argument, fx.Node)]
    known = [operand for operand in given if operand in walk.values]
    summed = node.target in _SUMS
    if not known or (node.target is aten.div.Tensor and node.args[1] in known):
        return None
    places = {place_of(operand, walk.values[operand]) for operand in known}
    widths = {len(walk.values[operand].channels) for operand in known} - {1}
    if len(places) > 1 or len(widths) > 1:
        return None
    (place,), count = places, max(widths, default=1)
    wide = [walk.values[operand].channels for operand in known if len(walk.values[operand].channels) == count]
    others = [operand for operand in given if operand not in known and size_at(operand, place) != 1]
    if others and (summed or others[0].op != "get_attr" or size_at(others[0], place) != count):
        return None
    for operand in known:
        if walk.values[operand].channels not in wide:
            walk.pin(operand)
    walk.union.join(wide[0], wide[-1])
    for number in others:
        walk.claim(node, number, len(shape_seen(number)) - place, wide[0], "follows")
    silent = [operand in known and walk.values[operand].silent for operand in given]
    added = len(given) == 1 and node.args[1] != 0
    kept = all(silent) and not added if summed else any(silent)
    return Value(len(shape_seen(node)) - place, wide[0], kept)


def _concatenation(walk: Walk, node: fx.Node) -> Value | None:
    given = cast(list[fx.Node], node.args[0])
    dim = arguments(node)["dim"] % len(shape_seen(node))
    known = [walk.values[part] for part in given if part in walk.values]
    if len({value.axis for value in known}) != 1:
        return None
    axis, silent = known[0].axis, all(value.silent for value in known)
    if dim == axis:
        unknown = {part: [PINNED] * shape_seen(part)[dim] for part in given if part not in walk.values}
        rows = [unknown[part] if part in unknown else walk.values[part].channels for part in given]
        return Value(axis, [channel for row in rows for channel in row], silent)
    if len(known) < len(given):
        return None
    for value in known[1:]:
        walk.union.join(known[0].channels, value.channels)
    return Value(axis, known[0].channels, silent)


def _over_dimensions(walk: Walk, node: fx.Node) -> Value | None:
    value, given = walk.values.get(source(node)), arguments(node)
    rank = len(shape_seen(source(node)))
    dims = {dim % rank for dim in given["dim"] or range(rank)}
    if value is None or value.axis in dims:
        return None
    gone = 0 if given["keepdim"] else sum(dim < value.axis for dim in dims)
    return Value(value.axis - gone, value.channels, value.silent)


def _reshape(walk: Walk, node: fx.Node) -> Value | None:
    """The axis as it is, in one dimension with some of those around it, but for that of the batch, or in several."""
    value, before, after = walk.values.get(source(node)), shape_seen(source(node)), shape_seen(node)
    if value is None or len(value.channels) == 1:
        return None
    behind, ahead = math.prod(before[value.axis + 1 :]), math.prod(before[1 : value.axis])
    for axis, size in enumerate(after):
        inner, left = divmod(behind, math.prod(after[axis + 1 :]))
        outer, rest = divmod(size, len(value.channels) * max(inner, 1))
        if inner and outer and not (left or rest or ahead % outer):
            return Value(axis, [channel for channel in value.channels for _ in range(inner)] * outer, value.silent)
    return split(walk, node, value)


def _slice(walk: Walk, node: fx.Node) -> Value | None:
    value, given = walk.values.get(source(node)), arguments(node)
    if value is None or given["dim"] % len(shape_seen(node)) != value.axis:
        return value
    if given["step"] != 1:
        return None
    return Value(value.axis, value.channels[given["start"] : given["end"]], value.silent)


def _pad(walk: Walk, node: fx.Node) -> Value | None:
    value, given = walk.values.get(source(node)), arguments(node)
    if value is None:
        return None
    zeros = given["mode"] == "constant" and not given["value"]
    before, after = padding_of(node, value.axis)
    if min(before, after) < 0 or (before + after and not zeros):
        return None
    channels = walk.fresh(before) + value.channels + walk.fresh(after)
    return Value(value.axis, channels, value.silent and (zeros or given["mode"] != "constant"))


def padding_of(node: fx.Node, axis: int) -> tuple[int, int]:
    """How far the pad `node` goes before and after what it is given, along `axis`."""
    sides = [*cast(list[int], node.args[1]), *[0] * (2 * len(shape_seen(node)))]
    place = padding_place(node, axis)
    return sides[place], sides[place + 1]


def padding_place(node: fx.Node, axis: int) -> int:
    """Where the padding before `axis` stands among the sides of the pad `node`, which begin with the last dimension."""
    return 2 * (len(shape_seen(node)) - 1 - axis)


_Rule = Callable[[Walk, fx.Node], Value | None]
"""What is known of the result of a node; None: nothing, and all that it reads is pinned."""
_RULES: dict[Any, _Rule] = {
    **dict.fromkeys(CONVOLUTIONS | LINEARS | TRANSPOSED | {aten.conv3d.default}, _layer),
    **dict.fromkeys(NORMS, _norm),
    **dict.fromkeys(RECTIFIERS | POINTWISE, _pointwise),
    aten.prelu.default: _slope,
    **dict.fromkeys(_COPIES, _same),
    **dict.fromkeys(_WINDOWS, _windows),
    **dict.fromkeys(_SUMS | _PRODUCTS, _elements),
    aten.cat.default: _concatenation,
    **dict.fromkeys(_OVER_DIMENSIONS, _over_dimensions),
    **dict.fromkeys(_RESHAPES, _reshape),
    **dict.fromkeys(MOVES, moved),
    aten.slice.Tensor: _slice,
    aten.pad.default: _pad,
    **dict.fromkeys(ATTENTION, attention),
    **dict.fromkeys(ALONG, along_others),
}
