"""What OpenVINO reads or computes wrongly of an artifact in ONNX, said otherwise; every rewrite keeps the values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from qsweep.engines._amx import wrong_in_a_row, wrong_in_groups
from qsweep.engines._onnx_nodes import add, attribute, producers_of, set_nodes
from qsweep.engines._onnx_tokens import MIDDLE

if TYPE_CHECKING:
    import onnx


def with_named_axes(content: onnx.ModelProto) -> None:
    """Axes of Fourier transforms as attributes, too, in place, as before opset 20 of ONNX: OpenVINO looks there."""
    from onnx import helper, numpy_helper

    constants = {tensor.name: tensor for tensor in content.graph.initializer}
    for node in content.graph.node:
        if node.op_type == "DFT" and len(node.input) == 3 and node.input[2] in constants:
            axis = int(numpy_helper.to_array(constants[node.input[2]]))
            node.attribute.append(helper.make_attribute("axis", axis))


def with_biases(content: onnx.ModelProto) -> None:
    """Linears on integers whose biases are all alike, such as zeros or none, have one that differs by what rounds to
    nothing, in place: of several without OpenVINO makes a kernel, for up to 8 rows, that gives anything."""
    from onnx import numpy_helper

    constants = {tensor.name: tensor for tensor in content.graph.initializer}
    stored = {node.output[0]: node.input for node in content.graph.node if node.op_type == "DequantizeLinear"}
    for node in content.graph.node:
        if node.op_type != "Gemm" or node.input[1] not in stored:
            continue
        if len(node.input) > 2 and node.input[2] not in stored:  # a real one
            continue
        bias = np.zeros(constants[stored[node.input[1]][0]].dims[0 if attribute(node, "transB") else 1], np.float32)
        if len(node.input) > 2:
            integers, step = (numpy_helper.to_array(constants[name]) for name in stored[node.input[2]][:2])
            bias += integers * step
        if (bias == bias[0]).all():
            bias[0] += _NOTHING if bias[0] == 0 else np.spacing(bias[0])
            del node.input[2:]
            node.input.append(add(content, f"{node.output[0]}.bias", bias))


_NOTHING = 1e-30
"""Less than any step of a grid."""


def without_wrong_kernels(content: onnx.ModelProto) -> None:
    """Convolutions of integers that AMX gets wrong (`_amx.py`) said otherwise, in place: those in groups as one for
    each group, those over one dimension as over images one pixel wide."""
    from onnx import helper, numpy_helper

    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in content.graph.initializer}
    producers, nodes = producers_of(content), list[Any]()

    def weights(node: onnx.NodeProto) -> str | None:
        """Name of the integers of a convolution whose zero is not the integer 0."""
        given, weight = map(producers.get, node.input[:2]) if node.op_type == "Conv" else (None, None)
        if given is None or weight is None:
            return None
        integers = {given.op_type, weight.op_type} == {"DequantizeLinear"} and constants[given.input[2]].any()
        return str(weight.input[0]) if integers else None

    def upright(node: onnx.NodeProto) -> None:
        """Over images one pixel wide."""
        name, (integers, *grid) = node.output[0], producers[node.input[1]].input
        last, wide = add(content, f"{name}.last", np.array([3])), f"{name}.weight"  # of its own: others may read it
        stored = add(content, f"{wide}.integers", constants[integers][..., None])
        nodes.append(helper.make_node("DequantizeLinear", [stored, *grid], [wide], name=wide, axis=0))
        settings = {each.name: helper.get_attribute_value(each) for each in node.attribute}
        begin, end = settings.get("pads", [0, 0])
        settings |= {each: [*settings.get(each, [1]), 1] for each in ("kernel_shape", "strides", "dilations")}
        settings["pads"] = [begin, 0, end, 0]
        image = [f"{name}.image", wide, *node.input[2:]]
        nodes.append(helper.make_node("Unsqueeze", [node.input[0], last], image[:1], name=image[0]))
        nodes.append(helper.make_node("Conv", image, [f"{name}.wide"], name=f"{name}.wide", **settings))
        nodes.append(helper.make_node("Squeeze", [f"{name}.wide", last], [name], name=name))

    def part(name: str, number: int, groups: int) -> str:
        """Of a weight or a bias, stored or dequantized, the rows of one group."""
        result = f"{name}.{number}"
        if name in constants:
            return add(content, result, np.split(constants[name], groups)[number])
        stored = [part(each, number, groups) for each in producers[name].input]
        nodes.append(helper.make_node("DequantizeLinear", stored, [result], name=result, axis=0))
        return result

    def by_group(node: onnx.NodeProto) -> None:
        name, groups = node.output[0], attribute(node, "group")
        given, parts = ([f"{name}.{what}{number}" for number in range(groups)] for what in ("given", "part"))
        nodes.append(helper.make_node("Split", node.input[:1], given, name=f"{name}.given", axis=1, num_outputs=groups))
        settings = {each.name: helper.get_attribute_value(each) for each in node.attribute} | {"group": 1}
        for number, result in enumerate(parts):
            read = [given[number], *(part(each, number, groups) for each in node.input[1:])]
            nodes.append(helper.make_node("Conv", read, [result], name=result, **settings))
        nodes.append(helper.make_node("Concat", parts, [name], name=name, axis=1))

    for node in content.graph.node:
        channels, *kernel = constants[name].shape[1:] if (name := weights(node)) else (0,)
        if name and len(kernel) == 1 and wrong_in_a_row(channels, kernel[0]):
            upright(node)
        elif name and attribute(node, "group", 1) > 1 and wrong_in_groups(channels, kernel):
            by_group(node)
        else:
            nodes.append(node)
    set_nodes(content, nodes)


def with_real_products(content: onnx.ModelProto) -> None:
    """Products of rows that set their own grids as those of dequantized values, in place, which OpenVINO computes on
    integers where the scale of weights is not 1; rows as int8, which it multiplies more quickly than uint8."""
    from onnx import helper, numpy_helper

    for tensor in content.graph.initializer:
        if tensor.name == MIDDLE:
            tensor.CopyFrom(numpy_helper.from_array(np.array(0, np.int8), MIDDLE))
    producers, nodes, made = producers_of(content), list[Any](), set[str]()

    def emit(kind: str, given: list[str], result: str, **more: Any) -> str:
        if result not in made:
            made.add(result)
            nodes.append(helper.make_node(kind, given, [result], name=result, **more))
        return result

    def real(integers: str, scale: str, value: float, zero: str) -> str:
        if scale not in made:
            made.add(add(content, scale, np.float32(value)))
        return emit("DequantizeLinear", [integers, scale, zero], f"{integers}.real")

    for node in content.graph.node:
        if node.op_type != "MatMulInteger":
            nodes.append(node)
            continue
        rows, columns, zero = node.input
        (weight,), (sums,) = producers[columns].input, node.output
        weights = real(weight, "rows.part", 1 / 128, zero)
        given = [real(rows, "rows.whole", 1, zero), emit("Transpose", [weights], f"{weight}.transposed", perm=[1, 0])]
        factor = add(content, f"{sums}.factor", np.float32(128))
        emit("Mul", [emit("MatMul", given, f"{sums}.part"), factor], sums)
    set_nodes(content, nodes)
