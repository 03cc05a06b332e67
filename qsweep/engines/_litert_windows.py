"""Windows of images: how they are padded, and pools of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from ai_edge_litert import schema_py_generated as schema
from torch import fx

from qsweep.engines._litert_ops import NONE, Result
from qsweep.engines._litert_values import Value, Values, channels_last
from qsweep.errors import Refused
from qsweep.hub.kinds import aten
from qsweep.hub.nodes import arguments

SAME, VALID = schema.Padding.SAME, schema.Padding.VALID
ONES = "ones"
"""The name of weights by which windows are summed: no work of the model's."""


def average(values: Values, node: fx.Node, given: Value, result: Result) -> Value:
    """`avg_pool2d`, as a depthwise convolution by the share of an element: of integers, exactly."""
    named = arguments(node)
    kernel = pair(named["kernel_size"])
    stride, padding = pair(named["stride"] or kernel), pair(named["padding"])
    image = values.arranged(given, channels_last(4))
    options = [named[name] for name in ("ceil_mode", "count_include_pad", "divisor_override")]
    ones = torch.ones(1, 1, *given.shape[2:])
    shares = aten.avg_pool2d(ones, kernel, stride, padding, *options)
    counted = aten.avg_pool2d(ones, kernel, stride, padding, options[0], True, 1)  # how many there are in each
    shares = shares / counted
    even = bool((shares == shares.flatten()[0]).all())
    image, mode = windows(values, image, result.shape, kernel, stride, padding, (1, 1))
    share = shares.flatten()[0].item() if even else 1.0
    made = _by_ones(values, image, result, kernel, stride, mode, share)
    if even:
        return made
    each = values.constant(shares, channels_last(4))
    return values.make("MUL", [made, each], result.shape, made.order, kind="MulOptions", fusedActivationFunction=NONE)


def every(values: Values, image: Value, dim: int, step: int) -> Value:
    """Every `step`th row (`dim` 2) or column (3) of images, as a depthwise convolution by one: XNNPACK, which has no
    slices with a step, would hand over to slower kernels and begin anew behind them."""
    shape = [size if place != dim else -(-size // step) for place, size in enumerate(image.shape)]
    stride = [step if dim == place else 1 for place in (2, 3)]
    image = values.arranged(image, channels_last(4))
    return _by_ones(values, image, Result(shape, image.grid), (1, 1), stride, VALID, 1.0)


def _by_ones(
    values: Values,
    image: Value,
    result: Result,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: int,
    share: float,
) -> Value:
    """Sums of windows times `share`, which is the scale of ones where integers are summed: what they give is exact."""
    count = image.shape[1]
    if result.grid is None:
        weights = values.constant(torch.full((1, *kernel, count), share)).index
        bias = values.constant(torch.zeros(count)).index
    else:
        assert image.grid is not None
        steps = (torch.tensor(image.grid.scale, dtype=torch.float32) * torch.tensor([share] * count)).tolist()
        ones = torch.ones(1, *kernel, count, dtype=torch.int8)
        weights = values.file.constant(ones, [share] * count, axis=3, name=ONES)
        bias = values.file.constant(torch.zeros(count, dtype=torch.int32), steps)
    return values.make(
        "DEPTHWISE_CONV_2D",
        [image, weights, bias],
        result.shape,
        channels_last(4),
        grid=result.grid,
        kind="DepthwiseConv2DOptions",
        padding=padding,
        strideH=stride[0],
        strideW=stride[1],
        depthMultiplier=1,
        fusedActivationFunction=result.activation,
    )


def maximum(values: Values, node: fx.Node, given: Value, shape: Sequence[int]) -> Value:
    """`max_pool2d`, of integers where `given` is."""
    named = arguments(node)
    kernel = pair(named["kernel_size"])
    stride, padding = pair(named["stride"] or kernel), pair(named["padding"])
    if any(size != 1 for size in pair(named["dilation"])):
        raise Refused("LiteRT takes max pools without dilation")
    image = values.arranged(given, channels_last(4))
    least = -128 if given.grid else torch.finfo(torch.float32).min
    image, mode = windows(values, image, shape, kernel, stride, padding, (1, 1), least)
    options = {"padding": mode, "strideH": stride[0], "strideW": stride[1], "fusedActivationFunction": NONE}
    size = {"filterHeight": kernel[0], "filterWidth": kernel[1]}
    return values.moved("MAX_POOL_2D", image, [], shape, image.order, "Pool2DOptions", **options, **size)


def windows(
    values: Values,
    image: Value,
    shape: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    fill: float | None = None,
) -> tuple[Value, int]:
    """`image`, padded where it has to be, and how an operator is told to pad it, so that windows give `shape`.

    `fill`: what stands around it; None for the real 0.
    """
    before, after, same = [0, 0], [0, 0], True
    for d in range(2):
        size, given = image.shape[2 + d], shape[2 + d]
        span = (kernel[d] - 1) * dilation[d] + 1
        before[d] = padding[d]
        after[d] = max(0, (given - 1) * stride[d] + span - size - padding[d])
        needed = max(0, (math.ceil(size / stride[d]) - 1) * stride[d] + span - size)
        same &= given == math.ceil(size / stride[d]) and needed // 2 == padding[d]
    if not any(before) and not any(after):
        return image, VALID
    if same:
        return image, SAME
    around = [[0, 0], [before[0], after[0]], [before[1], after[1]], [0, 0]]
    wide = [*image.shape[:2], *(image.shape[2 + d] + before[d] + after[d] for d in range(2))]
    return padded(values, image, around, wide, fill), VALID


def padded(
    values: Values, value: Value, around: Sequence[Sequence[int]], shape: Sequence[int], fill: float | None = None
) -> Value:
    """`value` with so much before and after each dimension as it lies."""
    sides = values.file.constant(torch.tensor(around, dtype=torch.int32))
    if fill is None:
        return values.moved("PAD", value, [sides], shape, value.order, "PadOptions")
    if value.grid is None:
        filling = values.file.constant(torch.tensor([fill], dtype=value.dtype))
    else:
        filling = values.file.constant(
            torch.tensor([int(fill)], dtype=torch.int8), [value.grid.scale], value.grid.zero_point
        )
    return values.moved("PADV2", value, [sides, filling], shape, value.order, "PadV2Options")


def pair(sizes: Any, beside: int | None = None) -> tuple[int, int]:
    """For height and width; `beside`: the height of signals, which have a width alone."""
    given = [sizes] if isinstance(sizes, int) else list(sizes)
    if len(given) == 2:
        return given[0], given[1]
    return (given[0] if beside is None else beside), given[0]
