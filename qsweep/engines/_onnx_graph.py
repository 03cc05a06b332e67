"""The hub form as an ONNX QDQ graph.

The structure of a graph is exported once by `torch.onnx` (seconds) and kept; a model of the same structure only fills
in its grids (milliseconds).
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from qsweep.engines._onnx_nodes import add, attribute, dequantizes, drop_notes, drop_unused, producers_of, set_nodes
from qsweep.engines._onnx_structure import skeleton
from qsweep.engines._onnx_tokens import with_token_grids
from qsweep.engines._onnx_weights import pack_weights, with_real_weights
from qsweep.hub.form import QuantizedModel, grid_of
from qsweep.hub.kinds import QUANTIZE
from qsweep.hub.nodes import attributes, nodes_of
from qsweep.hub.ties import steps_of_three

if TYPE_CHECKING:
    import onnx

    from qsweep.store import Store


def without_weights(model: QuantizedModel, store: Store) -> onnx.ModelProto:
    """The graph of `model` with its grids; the weights are inputs of nodes that nothing gives yet."""
    content = skeleton(model, store)
    _fill(content, [grid_of(node) for node in nodes_of(model.graph, {QUANTIZE})])
    with_token_grids(content)
    with_real_weights(content, model)
    names = {name for name, _ in attributes(model.graph)}
    inline = [tensor for tensor in content.graph.initializer if tensor.name not in names]
    del content.graph.initializer[:]
    content.graph.initializer.extend(inline)
    drop_unused(content)
    drop_notes(content)
    return content


def add_weights(content: onnx.ModelProto, weights: dict[str, Tensor]) -> None:
    """Give `content` its weights, in place: standard ONNX that needs nothing beside it."""
    from onnx import numpy_helper

    pack_weights(content, weights)
    read = {name for node in content.graph.node for name in node.input}
    for name, value in weights.items():
        if name in read:
            content.graph.initializer.append(numpy_helper.from_array(value.numpy(), name))
    _zero_points(content, weights)
    _integer_biases(content, weights)


def _zero_points(content: onnx.ModelProto, weights: dict[str, Tensor]) -> None:
    """Zero points, all 0, of integer weights: a Gemm whose weights have none stays float."""
    for node in content.graph.node:
        if node.op_type == "DequantizeLinear" and len(node.input) == 2 and node.input[0] in weights:
            zeros = np.zeros(len(weights[node.input[1]]), np.int8)
            node.input.append(add(content, f"{node.input[0]}.zero_point", zeros))


def _integer_biases(content: onnx.ModelProto, weights: dict[str, Tensor]) -> None:
    """Biases as int32 with the accumulator's step, which they are multiples of: without it a Gemm stays float."""
    from onnx import helper, numpy_helper

    producers = producers_of(content)
    constants = {tensor.name: tensor for tensor in content.graph.initializer}
    nodes = []
    for node in content.graph.node:
        sources = [producers.get(name) for name in node.input[:2]]
        if node.op_type in ("Conv", "Gemm") and len(node.input) > 2 and all(map(dequantizes, sources)):
            given, weight = (source.input[1] for source in sources if source is not None)
            step = torch.from_numpy(numpy_helper.to_array(constants[given]).copy()) * weights[weight]
            name = f"{node.input[2]}.integer"
            parts = (weights[node.input[2]] / step).round().to(torch.int32), step
            for suffix, value in zip(("", ".step"), parts, strict=True):
                content.graph.initializer.append(numpy_helper.from_array(value.numpy(), f"{name}{suffix}"))
            output = f"{name}.real"
            nodes.append(helper.make_node("DequantizeLinear", [name, f"{name}.step"], [output], name=output, axis=0))
            node.input[2] = output
        nodes.append(node)
    set_nodes(content, nodes)
    drop_unused(content)


def _fill(content: onnx.ModelProto, grids: list[Any]) -> None:
    """Put the real grids where the marks are, as uint8 from 0; make rectifiers bounds of the integers.

    (The runtime has fast kernels for uint8 activations only; scale and levels stay, so the shift is exact.)
    """
    from onnx import numpy_helper

    constants = {tensor.name: tensor for tensor in content.graph.initializer}
    producers = producers_of(content)
    readers = Counter(name for node in content.graph.node for name in node.input)
    integers: dict[str, tuple[str, Any]] = {}
    nodes = []
    for node in content.graph.node:
        marked = len(node.input) == 3  # weights have no zero point yet
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and marked:
            mark = round(float(numpy_helper.to_array(constants[node.input[1]])))
            node.input[1], node.input[2] = f"grid{mark}.scale", f"grid{mark}.zero_point"
            if node.op_type == "DequantizeLinear":
                integers[node.output[0]] = node.input[0], grids[mark - 1]
        elif node.op_type == "DequantizeLinear":
            node.input[:] = [node.input[0], f"{node.input[0]}_scale"]
            constants.pop(node.input[1], None)
        if node.op_type == "QuantizeLinear" and node.input[0] not in producers:
            nodes.append(_scaled_input(content, node, grids[mark - 1]))
        if node.op_type in ("Conv", "ConvTranspose") and node.input[0] in integers and node.input[1] in constants:
            nodes.append(_channel_scales(content, node, constants[node.input[1]], *integers[node.input[0]]))
        if node.op_type == "HardSwish" and node.input[0] in integers:
            nodes += _gated(content, node, *integers[node.input[0]])
        nodes.append(node)
        if node.op_type == "QuantizeLinear":
            nodes += _bounded(content, node, grids[mark - 1], producers, readers)
    for i, (scale, zero_point, low, _) in enumerate(grids, 1):
        add(content, f"grid{i}.scale", np.float32(scale))
        add(content, f"grid{i}.zero_point", np.uint8(zero_point - low))
    set_nodes(content, nodes)
    del content.graph.value_info[:]


def _channel_scales(
    content: onnx.ModelProto, node: onnx.NodeProto, weight: onnx.TensorProto, integers: str, grid: Any
) -> onnx.NodeProto:
    """What a convolution with real weights, such as a transposed one, reads: dequantized with a scale for each channel.

    (Between one scale and the next quantize op the runtime would round its weights to 8 bits of its own.)
    """
    from onnx import helper

    group = attribute(node, "group", 1)
    channels = weight.dims[0] if node.op_type == "ConvTranspose" else weight.dims[1] * group
    numbers = np.full(channels, grid[0], np.float32), np.full(channels, grid[1] - grid[2], np.uint8)
    name = f"{node.name}.given"
    ends = [add(content, f"{name}.{end}", number) for end, number in zip(("scale", "zero_point"), numbers, strict=True)]
    node.input[0] = name
    return helper.make_node("DequantizeLinear", [integers, *ends], [name], name=name, axis=1)


def _gated(content: onnx.ModelProto, node: onnx.NodeProto, integers: str, grid: Any) -> list[onnx.NodeProto]:
    """Make the hardswish `node` a product of integers, in place, where 3 is a whole number of steps and -3 on the grid:
    x times clip(x + 3, 0, 6) / 6, which is x with other ends and another scale. Returns the nodes that give this."""
    from onnx import helper

    scale, zero_point, low, high = grid
    three = steps_of_three(scale)
    if three is None or zero_point - low < three:
        return []
    ends = zero_point - low - three, min(zero_point - low + three, high - low)
    numbers = {"low": np.uint8(ends[0]), "high": np.uint8(ends[1]), "scale": np.float32(scale) / np.float32(6)}
    names = {end: add(content, f"{node.name}.{end}", number) for end, number in numbers.items()}
    bounded, gate = f"{node.name}.bounded", f"{node.name}.gate"
    node.op_type = "Mul"
    node.input.append(gate)
    return [
        helper.make_node("Clip", [integers, names["low"], names["high"]], [bounded], name=bounded),
        helper.make_node("DequantizeLinear", [bounded, names["scale"], names["low"]], [gate], name=gate),
    ]


def _scaled_input(content: onnx.ModelProto, node: onnx.NodeProto, grid: Any) -> onnx.NodeProto:
    """Times 1/scale, then quantized with scale 1: the contract's multiplication, where the runtime would divide."""
    from onnx import helper

    factor = add(content, f"{node.input[0]}.inverse_scale", np.float32(1) / np.float32(grid[0]))
    scaled = f"{node.input[0]}.scaled"
    product = helper.make_node("Mul", [node.input[0], factor], [scaled], name=scaled)
    node.input[0], node.input[1] = scaled, add(content, f"{scaled}.scale", np.float32(1))
    return product


def _bounded(
    content: onnx.ModelProto, node: onnx.NodeProto, grid: Any, producers: dict[str, Any], readers: Counter[str]
) -> list[onnx.NodeProto]:
    """A clip on the integers where the grid, or a rectifier that it then replaces, is narrower than uint8.

    (Not one of dequantized values: of two grids in a row without it the runtime makes one.)
    """
    from onnx import helper, numpy_helper

    scale, zero_point, lowest, highest = grid
    low, high = lowest, highest
    source = producers.get(node.input[0])
    rectifies = source is not None and source.op_type in ("Relu", "Clip") and readers[node.input[0]] == 1
    before = producers.get(source.input[0]) if source is not None and rectifies else None
    if source is not None and rectifies and (before is None or before.op_type != "DequantizeLinear"):
        constants = {tensor.name: tensor for tensor in content.graph.initializer}
        given = [float(numpy_helper.to_array(constants[name])) if name else None for name in source.input[1:]] or [0.0]
        bounds = [None if end is None else zero_point + round(end / scale) for end in (*given, None)][:2]
        node.input[0] = source.input[0]
        low = low if bounds[0] is None else max(low, bounds[0])
        high = high if bounds[1] is None else min(high, bounds[1])
    low, high = low - lowest, high - lowest
    if (low, high) == (0, 255):
        return []
    result, node.output[0] = node.output[0], f"{node.output[0]}_unbounded"
    ends = [add(content, f"{result}.{name}", np.uint8(end)) for name, end in (("low", low), ("high", high))]
    return [helper.make_node("Clip", [node.output[0], *ends], [result], name=f"{node.name}_bounds")]
