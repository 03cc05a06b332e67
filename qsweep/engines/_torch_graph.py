"""The hub form as Inductor's patterns know it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch.fx.passes.shape_prop import ShapeProp

from qsweep.engines._amx import WIDE, wrong_in_a_row, wrong_in_groups
from qsweep.hub.form import QuantizedModel, grid_of
from qsweep.hub.kinds import (
    COMPUTE,
    CONVOLUTIONS,
    DEQUANTIZE,
    LINEARS,
    NEAREST,
    QUANTIZE,
    RECTIFIERS,
    SAME_GRID,
    SIZE,
    aten,
)
from qsweep.hub.nodes import arguments, constant, nodes_of, set_constant, source
from qsweep.hub.ops import DEQUANTIZE_WEIGHT, LEAST_SCALE, QUANTIZE_ROWS
from qsweep.hub.weights import real_weight


def for_patterns(model: QuantizedModel) -> fx.GraphModule:
    """The graph of `model` as Inductor's patterns of integer kernels are written, in place."""
    with_token_grids(model)
    graph = with_own_weights(with_norms_as_steps(unsigned(model.graph)))
    return with_wide_groups(with_image_convolutions(graph))


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


def with_own_weights(graph: fx.GraphModule) -> fx.GraphModule:
    """A copy of its integer weights for each layer, in place: PyTorch's compiler makes one of equal dequantize ops, and
    its patterns want one that a single layer reads."""
    seen = set()
    for node in nodes_of(graph, {DEQUANTIZE_WEIGHT}):
        name, integers = str(source(node).target), constant(graph, node)
        if name in seen and integers is not None:
            name = f"{name}_{node.name}"
            set_constant(graph, name, integers.clone())
            with graph.graph.inserting_before(node):
                node.update_arg(0, graph.graph.get_attr(name))
        seen.add(name)
    graph.recompile()
    return graph


def with_token_grids(model: QuantizedModel) -> None:
    """Rows on grids of their own, and the linears that read them as products of integers, in place. The order is that
    of the contract: f32(sum) * row scale * weight scale + bias.

    Scales under `LEAST_SCALE` become that, not 1: such rows are nothing but zeros all the same, or next to it.
    """
    graph = model.graph
    quantized_rows = nodes_of(graph, {QUANTIZE_ROWS})
    if not quantized_rows:
        return
    ShapeProp(graph).propagate(model.example)
    call = graph.graph.call_function
    for rows in quantized_rows:
        values, _, high = rows.args
        with graph.graph.inserting_before(rows):
            largest = _chain(graph, source(rows), (aten.abs.default,), (aten.amax.default, [-1], True))
            scale = _chain(graph, largest, (aten.div.Tensor, high), (aten.clamp_min.default, LEAST_SCALE))
            steps = call(aten.mul.Tensor, (values, call(aten.reciprocal.default, (scale,))))
            levels = _chain(graph, steps, (aten.round.default,))
            integers = _chain(graph, levels, (aten.to.dtype, torch.int8))
            real = call(aten.mul.Tensor, (levels, scale))
        for reader in list(rows.users):
            if reader.target in LINEARS and source(reader, 1).target is DEQUANTIZE_WEIGHT:
                _multiply_rows(graph, reader, integers, scale)
            else:
                reader.replace_input_with(rows, real)
        graph.graph.erase_node(rows)
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _multiply_rows(graph: fx.GraphModule, linear: fx.Node, integers: fx.Node, scale: fx.Node) -> None:
    """Put the product of `integers` (..., K) in the place of `linear`."""
    call, stored = graph.graph.call_function, source(linear, 1)
    weight, bias = constant(graph, stored), arguments(linear)["bias"]
    assert weight is not None
    columns, depth = weight.shape
    with graph.graph.inserting_before(linear):
        sizes = [call(SIZE, (integers, dim)) for dim in range(len(linear.meta["tensor_meta"].shape) - 1)]
        flat = call(aten.reshape.default, (integers, [-1, depth]))
        sums = call(aten._int_mm.default, (flat, call(aten.permute.default, (stored.args[0], [1, 0]))))
        # no bound at all, but no pattern of Inductor's either: it would call oneDNN, slow for signed rows
        bounded = call(aten.clamp_max.default, (sums, 2**31 - 1))
        result = _chain(
            graph,
            call(aten.reshape.default, (bounded, [*sizes, columns])),
            (aten.to.dtype, torch.float32),
            (aten.mul.Tensor, scale),
            (aten.mul.Tensor, stored.args[1]),
        )
        linear.replace_all_uses_with(result if bias is None else call(aten.add.Tensor, (result, bias)))
    graph.graph.erase_node(linear)


def with_norms_as_steps(graph: fx.GraphModule) -> fx.GraphModule:
    """Convolutions of each channel with one number as a product and a sum, in place: Inductor joins these to the ops
    around them, where oneDNN would read and write all once more."""
    call = graph.graph.call_function
    for node in [node for node in nodes_of(graph, CONVOLUTIONS) if multiplies_channels(graph, node)]:
        given, stored = source(node), source(node, 1)
        factor, shift = real_weight(graph, stored)[:, 0], constant(graph, arguments(node)["bias"])
        set_constant(graph, f"{node.name}_factor", factor)
        set_constant(graph, f"{node.name}_shift", torch.zeros(factor.shape) if shift is None else shift.view_as(factor))
        with graph.graph.inserting_before(node):
            scaled = call(aten.mul.Tensor, (given, graph.graph.get_attr(f"{node.name}_factor")))
            node.replace_all_uses_with(call(aten.add.Tensor, (scaled, graph.graph.get_attr(f"{node.name}_shift"))))
        graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def multiplies_channels(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether it is a convolution of integers that multiplies each channel by one number: a norm that no layer took."""
    given, weight = arguments(node), constant(graph, node.args[1])
    if node.target not in CONVOLUTIONS or weight is None or source(node).target is not DEQUANTIZE:
        return False
    plain = not any(given["padding"]) and set(given["stride"]) == {1}
    return plain and given["groups"] == len(weight) == weight.numel()


def with_image_convolutions(graph: fx.GraphModule) -> fx.GraphModule:
    """Integer conv1d as conv2d over images one pixel high, in place: Inductor pads a quantized conv1d twice. One pixel
    wide where AMX gets them wrong (`_amx.py`), as it does not those."""
    call = graph.graph.call_function
    for node in nodes_of(graph, {aten.conv1d.default}):
        given, stored = source(node), source(node, 1)
        integers = constant(graph, stored)
        if given.target is not DEQUANTIZE or stored.target is not DEQUANTIZE_WEIGHT or integers is None:
            continue
        upright = wrong_in_a_row(*integers.shape[1:]) and grid_of(given)[1] != 0
        place = 3 if upright else 2
        set_constant(graph, str(source(stored).target), integers.unsqueeze(place))
        with graph.graph.inserting_before(given):
            given.update_arg(0, call(aten.unsqueeze.default, (given.args[0], place)))
        over_images(graph, node, given, place)
    graph.recompile()
    return graph


def over_images(graph: fx.GraphModule, node: fx.Node, image: fx.Node, place: int) -> None:
    """The conv1d `node` over `image`, what it reads with one pixel more at dimension `place`, in place; its weight has
    that, too."""
    call, named = graph.graph.call_function, arguments(node)
    sizes = [list(named[name]) for name in ("stride", "padding", "dilation")]
    for size, none in zip(sizes, (1, 0, 1), strict=True):
        size.insert(place - 2, none)
    with graph.graph.inserting_before(node):
        result = call(aten.conv2d.default, (image, node.args[1], named["bias"], *sizes, named["groups"]))
        node.replace_all_uses_with(call(aten.squeeze.dim, (result, place)))
    graph.graph.erase_node(node)


def with_wide_groups(graph: fx.GraphModule) -> fx.GraphModule:
    """Integer convolutions in groups that AMX gets wrong (`_amx.py`) as ones in groups of 32 channels, the last of
    which are multiplied by 0, in place."""
    call = graph.graph.call_function
    for node in nodes_of(graph, {aten.conv2d.default}):
        given, stored = source(node), source(node, 1)
        groups, integers = arguments(node)["groups"], constant(graph, stored)
        if given.target is not DEQUANTIZE or stored.target is not DEQUANTIZE_WEIGHT or integers is None or groups == 1:
            continue
        channels, *kernel = integers.shape[1:]
        if not wrong_in_groups(channels, kernel) or grid_of(given)[1] == 0:
            continue
        own = torch.arange(groups * channels).reshape(groups, channels)
        padded = F.pad(own, (0, WIDE - channels)).flatten()
        set_constant(graph, f"{node.name}_channels", padded)
        set_constant(graph, str(source(stored).target), F.pad(integers, (0, 0, 0, 0, 0, WIDE - channels)))
        with graph.graph.inserting_before(given):
            chosen = graph.graph.get_attr(f"{node.name}_channels")
            given.update_arg(0, call(aten.index_select.default, (given.args[0], 1, chosen)))
    graph.recompile()
    return graph


_KERNELS = COMPUTE | SAME_GRID - {aten.slice.Tensor, aten.pad.default, aten.pixel_shuffle.default, NEAREST}
"""Ops that Inductor runs on integers itself: grids beside them stay where its patterns look for them."""


def with_grid_input(graph: fx.GraphModule) -> torch.Tensor:
    """Let a new first input bring scales and zero points outside oneDNN's kernels, in place; returns its value (N,).

    Inductor writes a C++ kernel for each sum and mean, with the scales in its text: 7 s of the C++ compiler for every
    ResNet-20 whose scales are new. This way the text depends on the structure alone, and the compiler's cache has it.
    """
    with graph.graph.inserting_before(next(iter(graph.graph.nodes))):
        given = graph.graph.placeholder("grids")
    values: list[float] = []

    def numbers(*new: float) -> list[fx.Node]:
        places = range(len(values), len(values) + len(new))
        values.extend(new)
        return [graph.graph.call_function(aten.select.int, (given, 0, place)) for place in places]

    for node in nodes_of(graph, {QUANTIZE, DEQUANTIZE}):
        scale, zero_point, low, high = grid_of(node)
        if node.target is QUANTIZE and not _fuses(source(node)):
            with graph.graph.inserting_before(node):
                inverse, zero = numbers(1.0 / scale, zero_point)
                rounded = _chain(graph, source(node), (aten.mul.Tensor, inverse), (aten.round.default,))
                result = _chain(graph, rounded, (aten.add.Tensor, zero), (aten.clamp.default, low, high))
                result = _chain(graph, result, (aten.to.dtype, node.args[5]))
            node.replace_all_uses_with(result)
        elif node.target is DEQUANTIZE:
            readers = [user for user in node.users if not _has_kernel(user)]
            if not readers:
                continue
            with graph.graph.inserting_before(node):
                zero, step = numbers(zero_point, scale)
                centred = _chain(graph, source(node), (aten.to.dtype, torch.float32), (aten.sub.Tensor, zero))
                result = _chain(graph, centred, (aten.mul.Tensor, step))
            for reader in readers:
                reader.replace_input_with(node, result)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return torch.tensor(values, dtype=torch.float32)


def _fuses(node: fx.Node) -> bool:
    """Whether a quantize after `node` becomes part of its kernel, or of one before it."""
    if node.target in RECTIFIERS:
        node = source(node)
    return _has_kernel(node)


def _has_kernel(node: fx.Node) -> bool:
    """Inductor's pattern of a max pool takes `ceil_mode` for something else, and loses it."""
    return node.target in _KERNELS and not (node.target is aten.max_pool2d.default and arguments(node)["ceil_mode"])


def _chain(graph: fx.GraphModule, value: fx.Node, *steps: tuple[Any, ...]) -> fx.Node:
    for op, *rest in steps:
        value = graph.graph.call_function(op, (value, *rest))
    return value
