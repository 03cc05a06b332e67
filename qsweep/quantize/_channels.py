"""Channels that scale together: from an op that makes them to the convolutions and linears that read them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, fx

from qsweep.hub.kinds import COMPUTE, CONVOLUTIONS, POOLS, aten
from qsweep.hub.nodes import arguments, constant, set_constant, shape_seen, source
from qsweep.hub.norm import own_name

_HOMOGENEOUS = POOLS | {aten.relu.default, aten.leaky_relu.default, aten.max_pool2d.default}
"""Ops with f(s * x) = s * f(x) for every channel and s > 0. ReLU6 and hardtanh are not: their upper bound stays."""
_VIEWS = {
    aten.view.default,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.contiguous.default,
    aten.clone.default,
    aten.squeeze.dim,
    aten.unsqueeze.default,
}


def output_axis(graph: fx.GraphModule, node: fx.Node) -> int:
    """The dimension of the channels in what `node`, a convolution or linear, reads and gives."""
    return 1 if node.target in CONVOLUTIONS else len(shape_seen(node)) - 1


def readers(graph: fx.GraphModule, value: fx.Node, axis: int) -> list[fx.Node] | None:
    """The convolutions and linears that read `value`, whose channels lie along `axis`, with weights of their own.

    They read it through nothing but ops that a positive scale of a channel passes. None where anything else reads it.
    The shapes of `graph` must have been propagated.
    """
    found: list[fx.Node] = []
    for user in value.users:
        if user.target in COMPUTE:
            scalable = user.args[0] is value and axis == output_axis(graph, user) and has_own_weight(graph, user)
            deeper = [user] if scalable else None
        else:
            after = _axis_after(user, value, axis)
            deeper = None if after is None else readers(graph, user, after)
        if deeper is None:
            return None
        found += deeper
    return found


def has_own_weight(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether `node` has a constant weight that nothing else reads."""
    name = str(source(node, 1).target)
    return constant(graph, node.args[1]) is not None and own_name(graph, name, node) == name


def by_input_channel(node: fx.Node, weight: Tensor) -> Tensor:
    """View of `weight` of a convolution or linear as (groups, outputs a group, inputs a group, taps)."""
    groups = int(arguments(node)["groups"]) if node.target in CONVOLUTIONS else 1
    return weight.reshape(groups, len(weight) // groups, weight.shape[1], -1)


def input_maxima(node: fx.Node, weight: Tensor) -> Tensor:
    """(inputs,) largest absolute weight that each input channel of `node` meets."""
    return by_input_channel(node, weight).abs().amax((1, 3)).flatten()


def scale_inputs(node: fx.Node, weight: Tensor, scale: Tensor) -> Tensor:
    """`weight` of `node` with those of input channel i multiplied by `scale` (inputs,)[i]."""
    parts = by_input_channel(node, weight)
    return (parts * scale.reshape(parts.shape[0], 1, parts.shape[2], 1)).reshape(weight.shape)


def scale_outputs(weight: Tensor, scale: Tensor) -> Tensor:
    """`weight` (C, ...) with channel c multiplied by `scale` (C,)[c]."""
    return weight * scale.reshape(-1, *[1] * (weight.dim() - 1))


def wide_constant(graph: fx.GraphModule, node: fx.Node, index: int) -> Tensor:
    """The constant that is argument `index` of `node`, as float64."""
    value = constant(graph, node.args[index])
    assert value is not None
    return value.detach().double()


def replace_constant(graph: fx.GraphModule, node: fx.Node, index: int, value: Tensor) -> None:
    """Make `value`, float32, the constant that is argument `index` of `node`; others that read the old one keep it."""
    name = own_name(graph, str(source(node, index).target), node)
    set_constant(graph, name, value.float().contiguous())
    with graph.graph.inserting_before(node):
        node.update_arg(index, graph.graph.get_attr(name))


def _axis_after(user: fx.Node, value: fx.Node, axis: int) -> int | None:
    """Where the channels along `axis` of `value` lie in what `user` makes of it; None where a scale does not pass."""
    if user.all_input_nodes != [value]:
        return None
    before = shape_seen(value)
    if user.target in _HOMOGENEOUS:
        spatial = user.target not in (aten.relu.default, aten.leaky_relu.default)
        return None if spatial and (axis, len(before)) != (1, 4) else axis
    return _axis_of_view(before, shape_seen(user), axis) if user.target in _VIEWS else None


def _axis_of_view(before: torch.Size, after: torch.Size, axis: int) -> int | None:
    """The dimension of `after` with as many values as `axis` of `before`, and as many behind it."""
    inner = math.prod(before[axis + 1 :])
    for place in range(1, len(after)):
        if after[place] == before[axis] and math.prod(after[place + 1 :]) == inner:
            return place
    return None
