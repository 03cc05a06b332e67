"""What OpenVINO reads or computes wrongly of an artifact in ONNX, said otherwise; every rewrite keeps the values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from qsweep.engines._amx import wrong_in_a_row, wrong_in_groups
from qsweep.engines._onnx_nodes import add, attribute, dequantizes, producers_of, set_nodes
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

    constants = {tensor.name: tensor for tensor in content.graph.initializer}
    producers, nodes = producers_of(content), list[Any]()

    def array(name: str) -> Any:
        return numpy_helper.to_array(constants[name])

    def shape_of(node: onnx.NodeProto) -> list[int]:
        """Of the weights of a convolution of integers whose zero is not the integer 0; of others none."""
        given, weight = map(producers.get, node.input[:2]) if node.op_type == "Conv" else (None, None)
        integers = dequantizes(given) and dequantizes(weight) and array(given.input[2]).any()
        return list(constants[producers[node.input[1]].input[0]].dims) if integers else []

    def settings_of(node: onnx.NodeProto) -> dict[str, Any]:
        return {each.name: helper.get_attribute_value(each) for each in node.attribute}

    def upright(node: onnx.NodeProto) -> None:
        """Over images one pixel wide, with weights of its own, as others may read them."""
        name, (integers, *grid) = node.output[0], producers[node.input[1]].input
        last, wide = add(content, f"{name}.last", np.array([3])), f"{name}.weight"
        stored = add(content, f"{wide}.integers", array(integers)[..., None])
        nodes.append(helper.make_node("DequantizeLinear", [stored, *grid], [wide], name=wide, axis=0))
        settings = settings_of(node)
        begin, end = settings.get("pads", [0, 0])
        settings |= {each: [*settings.get(each, [1]), 1] for each in ("kernel_shape", "strides", "dilations")}
        settings["pads"] = [begin, 0, end, 0]
        image = [f"{name}.image", wide, *node.input[2:]]
        nodes.append(helper.make_node("Unsqueeze", [node.input[0], last], image[:1], name=image[0]))
        nodes.append(helper.make_node("Conv", image, [f"{name}.wide"], name=f"{name}.wide", **settings))
        nodes.append(helper.make_node("Squeeze", [f"{name}.wide", last], [name], name=name))

    def parts(name: str, groups: int, reader: str) -> list[str]:
        """Of a weight or a bias, stored or dequantized, the rows of each group, for `reader` alone."""
        results = [f"{reader}.{name}.{number}" for number in range(groups)]
        if name in constants:
            rows = np.split(array(name), groups)
            return [add(content, *each) for each in zip(results, rows, strict=True)]
        stored = zip(*(parts(each, groups, reader) for each in producers[name].input), strict=True)
        for result, given in zip(results, stored, strict=True):
            nodes.append(helper.make_node("DequantizeLinear", given, [result], name=result, axis=0))
        return results

    def by_group(node: onnx.NodeProto) -> None:
        """One for each group, with weights of its own."""
        name, groups = node.output[0], attribute(node, "group")
        given, results = ([f"{name}.{what}{number}" for number in range(groups)] for what in ("given", "part"))
        nodes.append(helper.make_node("Split", node.input[:1], given, name=f"{name}.given", axis=1, num_outputs=groups))
        settings = settings_of(node) | {"group": 1}
        for result, *read in zip(results, given, *(parts(each, groups, name) for each in node.input[1:]), strict=True):
            nodes.append(helper.make_node("Conv", read, [result], name=result, **settings))
        nodes.append(helper.make_node("Concat", results, [name], name=name, axis=1))

    for node in content.graph.node:
        _, channels, *kernel = shape_of(node) or (0, 0)
        if len(kernel) == 1 and wrong_in_a_row(channels, *kernel):
            upright(node)
        elif kernel and attribute(node, "group", 1) > 1 and wrong_in_groups(channels, kernel):
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
