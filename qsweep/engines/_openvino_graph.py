"""What OpenVINO rewrites wrongly once it has read it, said otherwise; every rewrite keeps the values."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import openvino
from openvino import opset13 as ops

from qsweep.errors import Refused


@cache
def core() -> openvino.Core:
    """One for the process: signals are handled on a stack of its CPU plugin, which goes with the last of these."""
    return openvino.Core()


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


def with_kept_axes(model: openvino.Model) -> None:
    """Means whose axes are left out after them, in place: factors and summands of channels before a mean, which go into
    the quantize op behind it, are taken for those of other channels where the axes go with the mean."""
    for node in model.get_ordered_ops():
        if node.get_type_name() == "ReduceMean" and not node.get_attributes()["keep_dims"]:
            value, axes = node.input_value(0), node.input_value(1)
            _replace(node.output(0), ops.squeeze(ops.reduce_mean(value, axes, keep_dims=True), axes).output(0))


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
