"""Channels followed through attention, where the channels of a head go as one."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations
from typing import cast

from torch import fx

from qsweep.hub.coupling import Value, Walk, place_of, size_at
from qsweep.hub.kinds import aten
from qsweep.hub.nodes import arguments, shape_seen, source

ATTENTION = {aten.scaled_dot_product_attention.default, aten.matmul.default}
ALONG = {aten.softmax.int, aten.layer_norm.default}
MOVES = {aten.permute.default, aten.transpose.int, aten.select.int}
_ON_THE_WAY = {
    aten.layer_norm.default,
    aten.slice.Tensor,
    aten.contiguous.default,
    aten.clone.default,
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.add.Tensor,
}
"""What may stand, beside moves, between a layer's result that is cut into heads and the product of these."""


def split(walk: Walk, node: fx.Node, value: Value) -> Value | None:
    """A reshape of channels to several dimensions: heads of attention are one channel each, and of other groups what
    has the same place in each goes together."""
    after, count = shape_seen(node), len(value.channels)
    behind = math.prod(shape_seen(source(node))[value.axis + 1 :])
    for first, last in combinations(range(len(after)), 2):
        sizes = after[first : last + 1]
        if math.prod(sizes) == count and math.prod(after[last + 1 :]) == behind and min(sizes) > 1:
            axis = next((axis for axis in range(first, last) if _is_of_heads(node, axis)), last)
            inner = math.prod(after[axis + 1 : last + 1])
            places = [index // inner % after[axis] for index in range(count)]
            channels = [value.channels[place * inner] for place in range(after[axis])]
            walk.union.join(value.channels, [channels[place] for place in places])
            return Value(axis, channels, value.silent)
    return None


def _is_of_heads(node: fx.Node, axis: int) -> bool:
    """Whether attention, or a product, takes what lies along `axis` each for itself."""
    for user in node.users:
        if user.target in ATTENTION:
            return len(shape_seen(node)) - axis >= 3
        after = axis if user.target in _ON_THE_WAY else axis_after(user, axis) if user.target in MOVES else None
        if after is not None and _is_of_heads(user, after):
            return True
    return False


def axis_after(move: fx.Node, axis: int) -> int | None:
    """Where `axis` lies behind a node of MOVES; None where one index of it is left."""
    rank = len(shape_seen(source(move)))
    if move.target is aten.select.int:
        dim = cast(int, move.args[1]) % rank
        return None if dim == axis else axis - (dim < axis)
    if move.target is aten.permute.default:
        return [dim % rank for dim in cast(list[int], move.args[1])].index(axis)
    one, other = (cast(int, dim) % rank for dim in move.args[1:3])
    return {one: other, other: one}.get(axis, axis)


def moved(walk: Walk, node: fx.Node) -> Value | None:
    value = walk.values.get(source(node))
    axis = None if value is None else axis_after(node, value.axis)
    return None if value is None or axis is None else replace(value, axis=axis)


def attention(walk: Walk, node: fx.Node) -> Value | None:
    """Of queries, keys and values, or a product of two, head by head."""
    fused = node.target is aten.scaled_dot_product_attention.default
    operands, mask = cast(list[fx.Node], node.args[: 3 if fused else 2]), arguments(node).get("attn_mask")
    known = {operand: walk.values[operand] for operand in operands if operand in walk.values}
    kinds = {(place_of(operand, value), len(value.channels)) for operand, value in known.items()}
    if any(operand not in known for operand in operands) or len(kinds) > 1:
        return None
    ((place, _),) = kinds
    if place < 3 or (mask is not None and (mask in walk.values or size_at(mask, place) != 1)):
        return None
    values = [known[operand] for operand in operands]
    for value in values:
        walk.union.join(values[0].channels, value.channels)
    silent = values[-1].silent if fused else any(value.silent for value in values)
    return Value(len(shape_seen(node)) - place, values[0].channels, silent)


def along_others(walk: Walk, node: fx.Node) -> Value | None:
    """A norm or softmax along other dimensions than that of the channels, which are not 0 behind it."""
    value, given, rank = walk.values.get(source(node)), arguments(node), len(shape_seen(node))
    first = given["dim"] % rank if "dim" in given else rank - len(given["normalized_shape"])
    dims = {first} if "dim" in given else set(range(first, rank))
    return None if value is None or value.axis in dims else Value(value.axis, value.channels, silent=False)
