"""Convolutions and linears as LiteRT has them, on integers or in floating point."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from qsweep.engines._litert_ops import Result
from qsweep.engines._litert_values import Value, Values, channels_last, plain
from qsweep.engines._litert_windows import VALID, pair, windows
from qsweep.errors import Refused
from qsweep.hub.nodes import arguments, source
from qsweep.hub.ops import DEQUANTIZE_WEIGHT


class Weight(NamedTuple):
    """Of a layer: real, or integers with a scale for each row."""

    name: str
    values: Tensor
    scales: Tensor | None = None


def weight_of(values: Values, node: fx.Node) -> Weight:
    """Of the layer `node`. Raises Refused for one that is computed from the input."""
    given = source(node, 1)
    if given.target is DEQUANTIZE_WEIGHT:
        integers, scales = (values.constants[source(given, place)] for place in range(2))
        return Weight(str(source(given).target), integers, scales)
    if given not in values.constants:
        raise Refused(f"LiteRT takes constant weights alone (`{node.target}` has others)")
    return Weight(str(given.target), values.constants[given])


def linear(
    values: Values, node: fx.Node, given: Value, weight: Weight, result: Result, *, by_rows: bool = False
) -> Value:
    """Of integers where a grid is asked for. `by_rows`: else of rows of int8, each on a grid of its own, as the kernel
    makes them of real ones where weights are integers."""
    rows = values.arranged(given, plain(len(given.shape)))
    integers = result.grid is not None or by_rows
    stored = _stored(values, weight, weight.values, axis=0, integers=integers)
    inputs: list[Value | int] = [rows, stored, _bias(values, node, rows, weight, result)]
    return values.make(
        "FULLY_CONNECTED",
        inputs,
        result.shape,
        grid=result.grid,
        kind="FullyConnectedOptions",
        keepNumDims=True,
        asymmetricQuantizeInputs=by_rows,
        fusedActivationFunction=result.activation,
    )


def convolution(values: Values, node: fx.Node, given: Value, weight: Weight, result: Result) -> Value:
    """Over one dimension or two."""
    flat = len(result.shape) == 3
    named = arguments(node)
    beside = {"stride": 1, "padding": 0, "dilation": 1}
    sizes: dict[str, Any] = {name: pair(named[name], least if flat else None) for name, least in beside.items()}
    image = _as_image(values, given) if flat else values.arranged(given, channels_last(4))
    kernel = weight.values.unsqueeze(2) if flat else weight.values
    groups, count = named["groups"], image.shape[1]
    shape = [*result.shape[:2], 1, result.shape[2]] if flat else list(result.shape)
    image, padding = windows(values, image, shape, kernel.shape[2:], **sizes)
    depthwise = groups == count and groups > 1
    laid = kernel.permute(1, 2, 3, 0) if depthwise else kernel.permute(0, 2, 3, 1)
    options: dict[str, Any] = {
        "padding": padding,
        "strideH": sizes["stride"][0],
        "strideW": sizes["stride"][1],
        "dilationHFactor": sizes["dilation"][0],
        "dilationWFactor": sizes["dilation"][1],
        "fusedActivationFunction": result.activation,
    }
    if depthwise:
        options["depthMultiplier"] = len(kernel) // count
    name, kind = ("DEPTHWISE_CONV_2D", "DepthwiseConv2DOptions") if depthwise else ("CONV_2D", "Conv2DOptions")
    stored = _stored(values, weight, laid, axis=3 if depthwise else 0, integers=result.grid is not None)
    inputs: list[Value | int] = [image, stored, _bias(values, node, image, weight, result)]
    made = values.make(name, inputs, shape, channels_last(4), grid=result.grid, kind=kind, **options)
    return _as_sound(values, made) if flat else made


def transposed(values: Values, node: fx.Node, given: Value, weight: Weight, shape: Sequence[int]) -> Value:
    """A transposed convolution in floating point, over one dimension or two."""
    flat, named = len(shape) == 3, arguments(node)
    stride, padding = pair(named["stride"], 1 if flat else None), pair(named["padding"], 0 if flat else None)
    if any(size != 1 for size in named["dilation"]):
        raise Refused("LiteRT takes transposed convolutions without dilation")
    image = _as_image(values, given) if flat else values.arranged(given, channels_last(4))
    own = weight.values.unsqueeze(2) if flat else weight.values
    kernel = _without_groups(own, named["groups"]).permute(1, 2, 3, 0)
    size = [shape[0], shape[1], 1, shape[2]] if flat else list(shape)
    full = [(image.shape[2 + d] - 1) * stride[d] + kernel.shape[1 + d] for d in range(2)]
    reach = [max(full[d], padding[d] + size[2 + d]) for d in range(2)]  # with what `output_padding` adds
    if reach != full:
        raise Refused("LiteRT takes transposed convolutions without `output_padding` past their windows")
    options = {"padding": VALID, "strideH": stride[0], "strideW": stride[1]}
    output = values.numbers(size[0], *full, size[1])
    stored, bias = _stored(values, weight, kernel, axis=0, integers=False), _real_bias(values, node, size[1])
    wide = [size[0], size[1], *full]
    made = values.make(
        "TRANSPOSE_CONV", [output, stored, image, bias], wide, channels_last(4), kind="TransposeConvOptions", **options
    )
    if wide != size:
        begin = values.numbers(0, *padding, 0)
        made = values.moved(
            "SLICE", made, [begin, values.numbers(size[0], *size[2:], size[1])], size, made.order, "SliceOptions"
        )
    return _as_sound(values, made) if flat else made


def _without_groups(kernel: Tensor, groups: int) -> Tensor:
    """(C, K / groups, H, W) with zeros where a group reads nothing: (C, K, H, W)."""
    count, each = len(kernel), kernel.shape[1]
    wide = kernel.new_zeros(groups, count // groups, groups, *kernel.shape[1:])
    for group, own in enumerate(kernel.reshape(groups, count // groups, *kernel.shape[1:])):
        wide[group, :, group] = own
    return wide.reshape(count, groups * each, *kernel.shape[2:])


def _stored(values: Values, weight: Weight, laid: Tensor, axis: int, *, integers: bool) -> int:
    """The index of weights as they are `laid`; those that floats read are made real as the file is loaded."""
    key = weight.name, tuple(laid.shape), integers
    if key not in values.stored:
        scales = [] if weight.scales is None else weight.scales.tolist()
        held = laid if scales else laid.float()
        stored = values.file.constant(held, scales, axis=axis, name=weight.name)
        if scales and not integers:
            packed, stored = stored, values.file.tensor(laid.shape, torch.float32)
            values.file.operator("DEQUANTIZE", [packed], stored, "DequantizeOptions")
        values.stored[key] = stored
    return values.stored[key]


def _bias(values: Values, node: fx.Node, given: Value, weight: Weight, result: Result) -> int:
    """The index: int32 in units of what is summed, where that is integers."""
    count = len(weight.values)
    if result.grid is None:
        return _real_bias(values, node, count)
    assert given.grid is not None
    assert weight.scales is not None
    step = torch.tensor(given.grid.scale, dtype=torch.float32) * weight.scales
    real = _constant_bias(values, node)
    integers = torch.zeros(count) if real is None else (real / step).round()
    return values.file.constant(integers.to(torch.int32), step.tolist())


def _real_bias(values: Values, node: fx.Node, count: int) -> int:
    real = _constant_bias(values, node)
    return values.constant(torch.zeros(count) if real is None else real).index


def _constant_bias(values: Values, node: fx.Node) -> Tensor | None:
    given = arguments(node)["bias"]
    if given is None:
        return None
    if given not in values.constants:
        raise Refused(f"LiteRT takes constant biases alone (`{node.target}` has others)")
    return values.constants[given].detach()


def _as_image(values: Values, given: Value) -> Value:
    """(N, C, L) as an image (N, C, 1, L) with its channels last."""
    rows = values.arranged(given, channels_last(3))
    count, channels, length = given.shape
    image = [count, 1, length, channels]
    made = values.moved("RESHAPE", rows, [values.numbers(*image)], image, None, "ReshapeOptions", newShape=image)
    return replace(made, shape=(count, channels, 1, length), order=channels_last(4))


def _as_sound(values: Values, image: Value) -> Value:
    count, channels, _, length = image.shape
    rows = [count, length, channels]
    made = values.moved("RESHAPE", image, [values.numbers(*rows)], rows, None, "ReshapeOptions", newShape=rows)
    return replace(made, shape=(count, channels, length), order=channels_last(3))
