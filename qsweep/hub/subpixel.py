"""Transposed convolutions as convolutions, which engines compute in integers.

What a transposed convolution of stride s gives at pixel s * q + r is, for each r, a convolution at q with every s-th of
its weights. One convolution gives them all, as channels, which are then put where they belong (Shi et al. 2016, "Is the
deconvolution layer the same as a convolutional layer?").
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.fx.passes.shape_prop import ShapeProp

from qsweep.hub.form import QuantizedModel
from qsweep.hub.kinds import TRANSPOSED, aten
from qsweep.hub.nodes import arguments, beside_first, constant, nodes_of, set_constant, shape_seen, source
from qsweep.hub.norm import fold_batch_norm, own_name
from qsweep.hub.plain import rectified_first

_CONVOLUTION: dict[Any, torch._ops.OpOverload] = {
    aten.conv_transpose1d.default: aten.conv1d.default,
    aten.conv_transpose2d.input: aten.conv2d.default,
}


def with_convolutions(model: QuantizedModel) -> QuantizedModel:
    """`model` with a convolution, its weights under the same name, for each transposed one over one dimension or two,
    in place; the batch norm behind it is folded.

    Where windows are no whole strides, fewer weights go into some pixels than into others, and zeros make up for it;
    where they would be more than the weights it stays as it is, as it does with a dilation.
    """
    graph = model.graph
    layers = [node for node in nodes_of(graph, TRANSPOSED) if _fits(graph, node)]
    if not layers:
        return model
    fold_batch_norm(graph, layers)
    with torch.no_grad():
        ShapeProp(graph).propagate(model.example)
    alike: dict[str, list[fx.Node]] = {}
    for node in layers:
        alike.setdefault(repr(beside_first(node)), []).append(node)
    for nodes in alike.values():
        _replace(graph, nodes)
    rectified_first(graph)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return model


def _fits(graph: fx.GraphModule, node: fx.Node) -> bool:
    weight, named = constant(graph, node.args[1]), arguments(node)
    known = weight is not None and (named["bias"] is None or constant(graph, named["bias"]) is not None)
    if node.target not in _CONVOLUTION or not known or set(named["dilation"]) != {1}:
        return False
    assert weight is not None
    wide = _wide(weight, named["stride"])
    if math.prod(wide) > 2 * weight[0, 0].numel():
        return False
    sizes = zip(wide, weight.shape[2:], named["padding"], named["output_padding"], strict=True)
    return all(cut + whole - window >= more for whole, window, cut, more in sizes)


def _wide(weight: Tensor, stride: list[int]) -> list[int]:
    """Sizes of the windows of `weight` (in, out, ...), up to whole strides."""
    return [step * math.ceil(window / step) for window, step in zip(weight.shape[2:], stride, strict=True)]


def _replace(graph: fx.GraphModule, nodes: list[fx.Node]) -> None:
    """Convolutions that share their constants for `nodes`, which do."""
    named, bias = arguments(nodes[0]), constant(graph, arguments(nodes[0])["bias"])
    weight, phases = _weight(graph, nodes[0]), math.prod(named["stride"])
    names = [_own(graph, nodes, 1, weight)]
    names += [] if bias is None else [_own(graph, nodes, 2, bias.repeat_interleave(phases))]
    for node in nodes:
        with graph.graph.inserting_before(node):
            constants = [graph.graph.get_attr(name) for name in names]
            node.replace_all_uses_with(_convolved(graph, node, list(weight.shape[2:]), *constants))
        graph.graph.erase_node(node)


def _convolved(
    graph: fx.GraphModule, node: fx.Node, taps: list[int], weight: fx.Node, bias: fx.Node | None = None
) -> fx.Node:
    """What `node` gives: a convolution with all its borders, its channels as pixels, cut to size."""
    named, call = arguments(node), graph.graph.call_function
    stride, cut = named["stride"], named["padding"]
    dims, ones = range(len(stride)), [1] * len(stride)
    given, wanted = shape_seen(source(node))[2:], shape_seen(node)[2:]
    every = [stride[dim] * (given[dim] + taps[dim] - 1) for dim in dims]
    # pixels of the convolution that are cut off on both sides are not computed
    off = [min(cut[dim], every[dim] - wanted[dim] - cut[dim]) for dim in dims]
    less = [min(off[dim] // stride[dim], taps[dim] - 1) for dim in dims]
    padding = [taps[dim] - 1 - less[dim] for dim in dims]
    sizes = [given[dim] + padding[dim] - less[dim] for dim in dims]
    operands = source(node), weight, bias
    value = call(_CONVOLUTION[node.target], (*operands, ones, padding, ones, named["groups"]))
    if max(stride) > 1:
        value = _shuffled(graph, value, stride, sizes, shape_seen(node)[1])
    for dim in dims:
        start = cut[dim] - stride[dim] * less[dim]
        if wanted[dim] < stride[dim] * sizes[dim]:
            value = call(aten.slice.Tensor, (value, 2 + dim, start, start + wanted[dim]))
    return value


def _weight(graph: fx.GraphModule, node: fx.Node) -> Tensor:
    """(C * phases, in / groups, ...) those of the convolution, from (in, C / groups, ...)."""
    weight, named = constant(graph, node.args[1]), arguments(node)
    assert weight is not None
    groups, stride, count = named["groups"], named["stride"], len(named["stride"])
    turned = weight.reshape(groups, -1, *weight.shape[1:]).transpose(1, 2).flatten(0, 1)
    wide = _wide(weight, stride)
    missing = [whole - window for whole, window in zip(wide, weight.shape[2:], strict=True)]
    turned = F.pad(turned, [side for more in reversed(missing) for side in (0, more)])
    apart = [size for whole, step in zip(wide, stride, strict=True) for size in (whole // step, step)]
    taps, phases = (range(start, 2 + 2 * count, 2) for start in (2, 3))
    turned = turned.reshape(*turned.shape[:2], *apart).flip(*taps)
    return turned.permute(0, *phases, 1, *taps).flatten(0, count)


def _own(graph: fx.GraphModule, nodes: list[fx.Node], place: int, value: Tensor) -> str:
    """The name of `value` in the place of the constant that is argument `place` of all `nodes`."""
    given = source(nodes[0], place)
    old, name = constant(graph, given), own_name(graph, str(given.target), *nodes)
    set_constant(graph, name, value.detach().contiguous(), trainable=old is not None and old.requires_grad)
    return name


def _shuffled(graph: fx.GraphModule, value: fx.Node, stride: list[int], sizes: list[int], channels: int) -> fx.Node:
    """(B, channels, ...) with the phases of each channel of `value` as pixels."""
    call, count = graph.graph.call_function, len(stride)
    if count == 2 and stride[0] == stride[1]:
        return call(aten.pixel_shuffle.default, (value, stride[0]))
    apart = call(aten.reshape.default, (value, [-1, channels, *stride, *sizes]))
    order = [axis for dim in range(count) for axis in (2 + count + dim, 2 + dim)]
    turned = call(aten.permute.default, (apart, [0, 1, *order]))
    wide = [step * size for step, size in zip(stride, sizes, strict=True)]
    return call(aten.reshape.default, (turned, [-1, channels, *wide]))
