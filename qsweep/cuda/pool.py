"""Pools of integers: maxima stay on their grid, averages are exact sums times one multiplier."""

from __future__ import annotations

from typing import Any

import triton
from torch import Tensor

from qsweep.cuda._launch import EXACT, check_offsets, check_result, grid_arguments, power_of_two
from qsweep.cuda._pools import average_all, average_windows, max_all, max_windows
from qsweep.cuda.arithmetic import Output


def max_pool2d(
    x: Tensor,
    out: Tensor,
    *,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
) -> Tensor:
    """Write the largest integer of each window of `x` into `out`, and return it.

    `x`: int8 (N, H, W, C), without its halo: pixels outside never win. `out`: int8 (N, OH, OW, C), whose size sets how
    many windows there are (ceil_mode is a larger `out`).
    """
    blocks, arguments = _layout(x, out)
    windows = _windows(kernel, stride, padding)
    max_windows[blocks](x, out, -128, **arguments, **windows, DH=dilation[0], DW=dilation[1], **EXACT)
    return out


def avg_pool2d(
    x: Tensor,
    zero_point: int,
    multiplier: float,
    output: Output | None,
    out: Tensor,
    *,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int] = (0, 0),
) -> Tensor:
    """Write f32(sum of x - zero_point over each window) * multiplier into `out`, onto `output`, and return it.

    `x`: int8 (N, H, W, C) without its halo; pixels outside count as the real 0. `out`: (N, OH, OW, C), int8, or
    floating point where `output` is None. `multiplier`: f32(s_x / (s_y * count)); for real results f32(s_x / count).
    """
    check_result(out, output)
    blocks, arguments = _layout(x, out)
    windows = _windows(kernel, stride, padding)
    average_windows[blocks](x, out, zero_point, multiplier, **grid_arguments(output), **arguments, **windows, **EXACT)
    return out


def global_max_pool(x: Tensor, out: Tensor) -> Tensor:
    """As `max_pool2d` over all pixels; `out` (N, C), any row stride."""
    blocks, arguments = _whole(x, out)
    max_all[blocks](x, out, -128, **arguments, **EXACT)
    return out


def global_avg_pool(x: Tensor, zero_point: int, multiplier: float, output: Output | None, out: Tensor) -> Tensor:
    """As `avg_pool2d` over all pixels; `out` (N, C), any row stride."""
    check_result(out, output)
    blocks, arguments = _whole(x, out)
    average_all[blocks](x, out, zero_point, multiplier, **grid_arguments(output), **arguments, **EXACT)
    return out


def _whole(x: Tensor, out: Tensor) -> tuple[tuple[int, int], dict[str, Any]]:
    check_offsets(x, out)
    count, height, width, channels = x.shape
    assert out.shape == (count, channels)
    across, pixels = min(64, power_of_two(channels)), min(64, power_of_two(height * width))
    strides = {"x_n": x.stride(0), "x_h": x.stride(1), "x_w": x.stride(2), "y_n": out.stride(0)}
    sizes = {"H": height, "W": width, "C": channels, "BP": pixels, "BC": across}
    return (count, triton.cdiv(channels, across)), sizes | strides


def _layout(x: Tensor, out: Tensor) -> tuple[tuple[int, int], dict[str, Any]]:
    check_offsets(x, out)
    assert x.stride(3) == 1 or x.shape[3] == 1
    rows, across = out.shape[:3].numel(), min(64, power_of_two(x.shape[3]))
    strides = {
        f"{name}_{axis}": tensor.stride(at) for name, tensor in (("x", x), ("y", out)) for at, axis in enumerate("nhw")
    }
    sizes = {"M": rows, "H": x.shape[1], "W": x.shape[2], "C": x.shape[3], "OH": out.shape[1], "OW": out.shape[2]}
    return (triton.cdiv(rows, 32), triton.cdiv(x.shape[3], across)), sizes | strides | {"BM": 32, "BC": across}


def _windows(kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]) -> dict[str, int]:
    given = {"K": kernel, "S": stride, "P": padding}
    return {f"{name}{axis}": values[at] for name, values in given.items() for at, axis in enumerate("HW")}
