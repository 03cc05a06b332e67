"""Channels that are nothing but zeros, taken out."""

from __future__ import annotations

from collections.abc import Callable, Collection
from operator import attrgetter
from typing import cast

import torch
from torch import Tensor, fx

from qsweep.hub.channels import couple, is_depthwise, padding_of, padding_place, row_dim
from qsweep.hub.coupling import PINNED, Coupling, Part
from qsweep.hub.form import QuantizedModel
from qsweep.hub.kinds import CONVOLUTIONS, LINEARS, TRANSPOSED, aten
from qsweep.hub.nodes import arguments, constant, nodes_of, set_constant, shape_seen, source


@torch.no_grad()
def slim(model: QuantizedModel) -> None:
    """Take the channels out of `model`, a float graph, that weights, biases and norms make all zeros, in place.

    It gives the same outputs, but for the order in which sums are rounded. Of a layer that is all zeros one channel
    stays.
    """
    layers = nodes_of(model.graph, CONVOLUTIONS | LINEARS | TRANSPOSED)
    if not any(_has_zero_rows(model.graph, layer) for layer in layers):
        return
    coupling = couple(model)
    dead = dead_channels(coupling, lambda name: attrgetter(name)(model.graph))
    for part in coupling.parts:
        _shorten(model.graph, part, dead)
    for node in coupling.values:
        _renumber(node, coupling, dead)
    for node in model.graph.graph.nodes:
        node.meta.pop("val", None)  # of sizes that are no more
    model.graph.recompile()


def _has_zero_rows(graph: fx.GraphModule, layer: fx.Node) -> bool:
    weight = constant(graph, layer.args[1])
    return weight is not None and any(_zero(weight, row_dim(layer)))


def _zero(values: Tensor, dim: int) -> list[bool]:
    """For each index along `dim`: whether there is nothing else."""
    return cast(list[bool], (values.movedim(dim, 0).reshape(values.shape[dim], -1) == 0).all(1).tolist())


def dead_channels(coupling: Coupling, tensor: Callable[[str], Tensor], kept: Collection[int] = ()) -> set[int]:
    """The channels that weights, biases and norms, each a `tensor` of its name, make all zeros, but for those `kept`
    and one of each layer."""
    alive = {PINNED, *kept}
    for part in coupling.parts:
        if part.silences:
            zero = _zero(tensor(part.name), part.dim)
            alive |= {channel for channel, none in zip(part.channels, zero, strict=True) if not none}
    return {channel for width in coupling.widths() for channel in _spared(width.channels, alive)}


def _spared(channels: list[int], alive: set[int]) -> list[int]:
    dead = [channel for channel in channels if channel not in alive]
    return dead[1:] if len(dead) == len(channels) else dead


def left_of(channels: list[int], dead: set[int]) -> list[int]:
    """Indices of what is not dead."""
    return [index for index, channel in enumerate(channels) if channel not in dead]


def _shorten(graph: fx.GraphModule, part: Part, dead: set[int]) -> None:
    left = left_of(part.channels, dead)
    if len(left) < len(part.channels):
        value = attrgetter(part.name)(graph)
        kept = value.detach().index_select(part.dim, torch.tensor(left))
        set_constant(graph, part.name, kept, trainable=value.requires_grad)


def _renumber(node: fx.Node, coupling: Coupling, dead: set[int]) -> None:
    """Numbers of channels in the arguments of `node`."""
    value, given = coupling.values[node], coupling.values.get(node.all_input_nodes[0])
    left = len(left_of(value.channels, dead))
    if given is None or (left == len(value.channels) and node.target is not aten.slice.Tensor):
        return
    named = arguments(node)
    if node.target is aten.reshape.default:
        shape = list(cast(list[int], node.args[1]))
        if shape[value.axis] != -1:
            shape[value.axis] = left
        node.args = (source(node), shape)
    elif node.target is aten.slice.Tensor and named["dim"] % len(shape_seen(node)) == value.axis:
        start = len(left_of(given.channels[: named["start"] or 0], dead))
        node.args, node.kwargs = (source(node), value.axis, start, start + left), {}
    elif node.target is aten.pad.default and any(sides := padding_of(node, value.axis)):
        around, place = list(cast(list[int], node.args[1])), padding_place(node, value.axis)
        around[place] = len(left_of(value.channels[: sides[0]], dead))
        around[place + 1] = left - around[place] - len(left_of(given.channels, dead))
        node.args = (source(node), around, *node.args[2:])
    elif node.target in CONVOLUTIONS and is_depthwise(node):
        named["groups"] = len(left_of(given.channels, dead))
        node.args, node.kwargs = tuple(named.values()), {}
