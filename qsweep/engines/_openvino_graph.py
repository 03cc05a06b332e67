"""What OpenVINO reads or rewrites wrongly, brought to what it gets right; every rewrite keeps the values."""

from __future__ import annotations

import copy
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import openvino
from openvino import opset13 as ops

from qsweep.engines._onnx_nodes import add, attribute, producers_of, set_nodes
from qsweep.engines._onnx_tokens import MIDDLE
from qsweep.errors import Refused

if TYPE_CHECKING:
    import onnx


@cache
def core() -> openvino.Core:
    """One for the process: signals are handled on a stack of its CPU plugin, which goes with the last of these."""
    return openvino.Core()


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


def without_narrow_groups(content: onnx.ModelProto) -> None:
    """Convolutions of integers in groups of 17 to 31 channels that give more than 32 each as one for each group, in
    place: with AMX a kernel of several gets all groups but the first wrong where zero is not the integer 0."""
    from onnx import helper, numpy_helper

    constants = {tensor.name: tensor for tensor in content.graph.initializer}
    producers, nodes = producers_of(content), list[Any]()

    def part(name: str, number: int, groups: int) -> str:
        """Of what is stored of a weight or a bias the rows of one group, dequantized where it is."""
        if name in constants:
            value = numpy_helper.to_array(constants[name])
            return add(content, f"{name}.{number}", np.split(value, groups)[number]) if value.ndim else name
        stored, result = producers[name], f"{name}.{number}"
        given = [part(each, number, groups) for each in stored.input]
        nodes.append(helper.make_node(stored.op_type, given, [result], name=result, axis=0))
        return result

    for node in content.graph.node:
        stored, groups = producers.get(node.input[1]) if node.op_type == "Conv" else None, attribute(node, "group", 1)
        if stored is None or stored.op_type != "DequantizeLinear" or groups == 1:
            nodes.append(node)
            continue
        results, channels, *kernel = constants[stored.input[0]].dims
        if not 16 < channels < 32 or results <= 32 * groups or kernel == [1] * len(kernel):
            nodes.append(node)
            continue
        name = node.output[0]
        given, parts = ([f"{name}.{what}{number}" for number in range(groups)] for what in ("given", "part"))
        nodes.append(helper.make_node("Split", node.input[:1], given, name=f"{name}.given", axis=1, num_outputs=groups))
        for number in range(groups):
            one = copy.deepcopy(node)
            one.input[:] = [given[number], *(part(each, number, groups) for each in node.input[1:])]
            one.output[0] = one.name = parts[number]
            next(each for each in one.attribute if each.name == "group").i = 1
            nodes.append(one)
        nodes.append(helper.make_node("Concat", parts, [name], name=name, axis=1))
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


def without_reduced_maxima(model: openvino.Model) -> None:
    """Maxima as the first of each sorted axis, in place: what OpenVINO fuses behind a ReduceMax of floats comes out
    wrong, such as a quantize op without its scale."""
    for node in model.get_ordered_ops():
        if (kind := node.get_type_name()) not in ("ReduceMax", "ReduceMin"):
            continue
        value, axes = node.input_value(0), node.input_value(1)
        for axis in np.atleast_1d(axes.get_node().get_data()):
            value = ops.topk(value, 1, int(axis), kind.removeprefix("Reduce").lower(), "none").output(0)
        if not node.get_attributes()["keep_dims"]:
            value = ops.squeeze(value, axes).output(0)
        _replace(node.output(0), value)


def with_compared_masks(model: openvino.Model) -> None:
    """Masks of whole numbers by comparison with zero, in place: the compiler stops at one made of a part of several."""
    for node in model.get_ordered_ops():
        if node.get_type_name() == "Convert" and node.get_output_element_type(0) == openvino.Type.boolean:
            kind = node.get_input_element_type(0)
            if kind.is_integral() and kind != openvino.Type.boolean:
                _replace(node.output(0), ops.not_equal(node.input_value(0), ops.constant(0, kind)).output(0))


def takes_integers(model: openvino.Model) -> None:
    """Inputs of which a model makes integers alone, such as numbers of words, are integers, in place: of floats bf16
    keeps the first 8 bits. Raises Refused for inputs of which it makes integers of a part."""
    for given in model.get_parameters():
        if _becomes_integers(given.output(0)):
            given.set_element_type(openvino.Type.i64)
        elif given.get_element_type().is_real() and any(map(_moves_integers, _readers(given.output(0)))):
            raise Refused("in bf16 OpenVINO rounds whole numbers that are given beside real ones; use `float`")
    model.validate_nodes_and_infer_types()


def _readers(value: Any) -> list[Any]:
    """The nodes that read `value`."""
    return [each.get_node() for each in value.get_target_inputs()]


def _becomes_integers(value: Any) -> bool:
    """Whether all that reads `value` makes integers of it, asks for its shape, or moves it to what does."""
    readers = _readers(value)
    return bool(readers) and all(
        _moves_integers(reader)
        or (reader.get_type_name() in ("Convert", "ShapeOf") and reader.get_output_element_type(0) in _INTEGERS)
        for reader in readers
    )


def _moves_integers(node: Any) -> bool:
    """Whether it moves what it is given to what makes integers of it."""
    return node.get_type_name() in _MOVES and all(map(_becomes_integers, node.outputs()))


_INTEGERS = {openvino.Type.i32, openvino.Type.i64}
_MOVES = {"Gather", "Reshape", "Slice", "Split", "Squeeze", "StridedSlice", "Transpose", "Unsqueeze", "VariadicSplit"}
"""Of what they are given first."""
_RECURRENT = {"GRUSequence", "LSTMSequence"}
"""Want their weights as constants."""


def computed_constants(model: openvino.Model) -> None:
    """Quantized values that follow from parameters and the shape of the input alone (tokens repeated for each sample,
    embeddings of places) as constants, in place: sums of them stop the compiler, and so do reshapes behind
    convolutions of such values, quantized or not, and weights of recurrent layers that have yet to be computed. Weights
    of others stay integers."""
    fixed: set[str] = set()
    quantized: set[str] = set()
    ends = []
    nodes = model.get_ordered_ops()
    for node in nodes:
        kind, name = node.get_type_name(), node.get_name()
        given = {each.get_source_output().get_node().get_name() for each in node.inputs()}
        if kind in ("Constant", "ShapeOf") or (given and given <= fixed):
            fixed.add(name)
            if kind == "FakeQuantize" or given & quantized:
                quantized.add(name)
            elif kind in ("Convolution", "GroupConvolution"):
                ends.append(node.output(0))
        elif kind in _RECURRENT:
            for each in (given.get_source_output() for given in node.inputs()):
                if each.get_node().get_name() in fixed and each.get_node().get_type_name() != "Constant":
                    ends.append(each)
    ends += [
        output
        for node in nodes
        if node.get_name() in quantized
        for output in node.outputs()
        if any(each.get_node().get_name() not in fixed for each in output.get_target_inputs())
    ]
    if not ends:
        return
    exactly = {"LP_TRANSFORMS_MODE": False, "INFERENCE_PRECISION_HINT": "f32"}
    compute = core().compile_model(openvino.Model(ends, model.get_parameters()), "CPU", exactly)
    found = compute(np.zeros(model.input().shape, model.input().get_element_type().to_dtype()))
    for output, value in zip(ends, found.values(), strict=True):
        _replace(output, ops.constant(value).output(0))


def _replace(output: Any, by: Any) -> None:
    for reader in output.get_target_inputs():
        reader.replace_source_output(by)
