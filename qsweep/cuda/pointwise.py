"""Element by element: onto a grid and off it, tables, sums, and copies between grids.

All tensors of a call have the same shape, of 1 to 4 dimensions, and any strides; fast where the last dimension has
stride 1 in each: call with the channels last.
"""

from __future__ import annotations

from torch import Tensor

from qsweep.cuda.arithmetic import Operand, Output


def quantize(x: Tensor, scale: float, output: Output, out: Tensor, *, invalid: Tensor | None = None) -> Tensor:
    """Write float `x` into `out` (int8) as clamp(round(x * f32(1 / scale)) + zero_point, low, high), and return it.

    Infinities go to the ends. A NaN is written as `low` and sets `invalid`, int32 (1,), to 1; the caller zeroes and
    checks it. Raises `Refused` where 1 / scale is no positive finite float32: 0, NaN, and scales under 2^-128.
    """
    raise NotImplementedError


def dequantize(x: Tensor, scale: float, zero_point: int, out: Tensor) -> Tensor:
    """Write int8 `x` into `out`, float32, as f32(x - zero_point) * f32(scale), and return it."""
    raise NotImplementedError


def look_up(x: Tensor, table: Tensor, out: Tensor) -> Tensor:
    """Write table[x + 128] into `out`, and return it; `x`, `out` int8, `table` int8 (256,)."""
    raise NotImplementedError


def add(left: Operand, right: Operand, output: Output | None, out: Tensor) -> Tensor:
    """Write the sum of two integer tensors into `out`, and return it: two products and one sum in float32.

    `output` None: float32 results, and the operands' multipliers are their scales.
    """
    raise NotImplementedError


def rescale(x: Tensor, scale: float, zero_point: int, out_scale: float, output: Output, out: Tensor) -> Tensor:
    """Write int8 `x` from one grid onto another, as dequantize and then quantize do, and return `out`."""
    raise NotImplementedError


def copy(x: Tensor, out: Tensor) -> Tensor:
    """Write `x` into `out`, both int8 and on the same grid (a part of a concatenation), and return it."""
    raise NotImplementedError
