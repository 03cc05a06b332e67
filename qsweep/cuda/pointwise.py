"""Element by element: onto a grid and off it, tables, sums, products, and copies between grids.

All tensors of a call have the same shape, of 1 to 4 dimensions, and any strides, 0 where one is repeated; fast where
the last dimension has stride 1 in each: call with the channels last.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor

from qsweep.cuda._elements import (
    add_elements,
    look_up_elements,
    multiply_elements,
    quantize_elements,
    quantize_pixels,
    repeat_elements,
    rescale_elements,
)
from qsweep.cuda._launch import EXACT, check_offsets, check_result, grid_arguments, power_of_two
from qsweep.cuda.arithmetic import Operand, Output
from qsweep.errors import Refused

DIMENSIONS = 4
"""At most."""
_PIXELS = 1024
"""Of a program: 8 of each of its threads, 16-byte loads of 16-bit and 32-bit images."""


def quantize(x: Tensor, scale: float, output: Output, out: Tensor, *, invalid: Tensor | None = None) -> Tensor:
    """Write float `x` into `out` (int8) as clamp(round(x * f32(1 / scale)) + zero_point, low, high), and return it.

    Infinities go to the ends. A NaN is written as `low` and sets `invalid`, int32 (1,), to 1; the caller zeroes and
    checks it. Raises `Refused` where 1 / scale is no positive finite float32: 0, NaN, and scales under 2^-128.
    """
    assert out.dtype == torch.int8
    blocks, arguments = _layout(x=x, y=out)
    flag = invalid is not None
    grid = grid_arguments(output)
    quantize_elements[blocks](
        x, out, invalid if flag else out, inverse_of(scale), **grid, **arguments, FLAG=flag, **EXACT
    )
    return out


def quantize_images(x: Tensor, scale: float, output: Output, out: Tensor, *, invalid: Tensor | None = None) -> Tensor:
    """As `quantize`, of images with few channels, which are written a pixel at a time.

    `x`: float (N, C, H, W), C <= 4, any strides. `out`: int8 (N, H, W, 4), channel stride 1, the others multiples of 4;
    of channels past C the integer 0 is written.
    """
    assert out.dtype == torch.int8 and x.shape[1] <= out.shape[3] == 4
    assert (len(x), *x.shape[2:]) == out.shape[:3]
    check_offsets(x, out)
    count, words, flag = out.shape[:3].numel(), out.view(torch.int32), invalid is not None
    quantize_pixels[(triton.cdiv(count, _PIXELS),)](
        x,
        words,
        invalid if flag else words,
        inverse_of(scale),
        **grid_arguments(output),
        M=count,
        **dict(zip(("x_n", "x_c", "x_h", "x_w"), x.stride(), strict=True)),
        **dict(zip(("y_n", "y_h", "y_w"), words.stride(), strict=False)),
        C=x.shape[1],
        H=x.shape[2],
        W=x.shape[3],
        FLAG=flag,
        BM=_PIXELS,
        **EXACT,
    )
    return out


def inverse_of(scale: float) -> float:
    """f32(1 / f32(scale)). Raises `Refused` where that is no positive finite float32."""
    with np.errstate(all="ignore"):
        inverse = float(np.float32(1) / np.float32(scale))
    if not (math.isfinite(inverse) and inverse > 0):
        raise Refused(f"the scale of a grid: must be positive with a finite inverse in float32 (got {scale})")
    return inverse


def dequantize(x: Tensor, scale: float, zero_point: int, out: Tensor) -> Tensor:
    """Write int8 `x` into `out`, float32, as f32(x - zero_point) * f32(scale), and return it."""
    assert out.dtype == torch.float32
    blocks, arguments = _layout(x=x, y=out)
    rescale_elements[blocks](x, out, zero_point, scale, 1.0, **grid_arguments(None), **arguments, **EXACT)
    return out


def look_up(x: Tensor, table: Tensor, out: Tensor) -> Tensor:
    """Write table[x + 128] into `out`, and return it; `x`, `out` int8, `table` int8 (256,)."""
    assert table.shape == (256,)
    blocks, arguments = _layout(x=x, y=out)
    look_up_elements[blocks](x, out, table, **arguments, TABLE=True, **EXACT)
    return out


def add(
    left: Operand,
    right: Operand,
    output: Output | None,
    out: Tensor,
    *,
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> Tensor:
    """Write the sum of two integer tensors into `out`, and return it: two products and one sum in float32.

    `output` None: real results within `bounds`, and the operands' multipliers are their scales.
    """
    check_result(out, output)
    blocks, arguments = _layout(l=left.values, r=right.values, y=out)
    add_elements[blocks](
        left.values,
        right.values,
        out,
        left.zero_point,
        left.multiplier,
        right.zero_point,
        right.multiplier,
        **grid_arguments(output, bounds),
        **arguments,
        **EXACT,
    )
    return out


def multiply(
    left: Tensor,
    left_zero: int,
    right: Tensor,
    right_zero: int,
    multiplier: float,
    output: Output | None,
    out: Tensor,
    *,
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> Tensor:
    """Write the product of two int8 tensors into `out`, and return it.

    v = f32((left - left_zero) * (right - right_zero)) * multiplier, which is both scales over that of `output`. None:
    real results within `bounds`, and the multiplier is the product of the scales.
    """
    check_result(out, output)
    blocks, arguments = _layout(l=left, r=right, y=out)
    numbers = grid_arguments(output, bounds)
    multiply_elements[blocks](left, right, out, left_zero, right_zero, multiplier, **numbers, **arguments, **EXACT)
    return out


def rescale(x: Tensor, scale: float, zero_point: int, out_scale: float, output: Output, out: Tensor) -> Tensor:
    """Write int8 `x` from one grid onto another, as dequantize and then quantize do, and return `out`."""
    assert out.dtype == torch.int8
    blocks, arguments = _layout(x=x, y=out)
    inverse = inverse_of(out_scale)
    rescale_elements[blocks](x, out, zero_point, scale, inverse, **grid_arguments(output), **arguments, **EXACT)
    return out


def copy(x: Tensor, out: Tensor) -> Tensor:
    """Write `x` into `out`, both int8 and on the same grid (a part of a concatenation), and return it."""
    blocks, arguments = _layout(x=x, y=out)
    look_up_elements[blocks](x, out, x, **arguments, TABLE=False, **EXACT)
    return out


def repeat(x: Tensor, out: Tensor) -> Tensor:
    """Write each pixel of `x` (N, H, W, C) into `out` (N, d H, a W, C), d times down and a across; both int8."""
    (_, height, width, _), (_, lines, columns, _) = x.shape, out.shape
    assert lines % height == columns % width == 0
    check_offsets(x)
    blocks, arguments = _layout(flat=False, y=out)
    strides = {f"x_{axis}": stride for axis, stride in zip("abcd", x.stride(), strict=True)}
    repeat_elements[blocks](x, out, **strides, **arguments, DOWN=lines // height, ACROSS=columns // width, **EXACT)
    return out


def _layout(*, flat: bool = True, **tensors: Tensor) -> tuple[tuple[int, int], dict[str, Any]]:
    """The launch grid, and sizes and strides as the kernels take them, of tensors of one shape; `flat`: with as few
    dimensions as they allow."""
    check_offsets(*tensors.values())
    shape = next(iter(tensors.values())).shape
    assert all(tensor.shape == shape for tensor in tensors.values())
    views = {name: tensor[(None,) * (DIMENSIONS - tensor.dim())] for name, tensor in tensors.items()}
    if flat and all(_rows_apart(view) for view in views.values()):
        views = {name: view.as_strided(_flat(view), (0, 0, *view.stride()[2:])) for name, view in views.items()}
    first, second, third, last = next(iter(views.values())).shape
    count = first * second * third
    rows = min(power_of_two(count), 2048 // min(64, power_of_two(last)))
    columns = min(power_of_two(last), 2048 // rows)
    strides = {f"{name}_{axis}": view.stride(at) for name, view in views.items() for at, axis in enumerate("abcd")}
    sizes = {"R": count, "B": second, "C": third, "D": last, "BR": rows, "BD": columns}
    return (triton.cdiv(count, rows), triton.cdiv(last, columns)), sizes | strides


def _rows_apart(view: Tensor) -> bool:
    """Whether all rows of the last dimension lie at equal distances."""
    first, second, third, _ = view.shape
    a, b, c, _ = view.stride()
    return (second == 1 or b == third * c) and (first == 1 or a == second * third * c)


def _flat(view: Tensor) -> tuple[int, int, int, int]:
    return 1, 1, view.shape[:3].numel(), view.shape[3]
