"""Pools of integers: maxima stay on their grid, averages are exact sums times one multiplier."""

from __future__ import annotations

from torch import Tensor

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
    raise NotImplementedError


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
    float32 where `output` is None. `multiplier`: f32(s_x / (s_y * count)); for float32 results f32(s_x / count).
    """
    raise NotImplementedError


def global_avg_pool(x: Tensor, zero_point: int, multiplier: float, output: Output | None, out: Tensor) -> Tensor:
    """As `avg_pool2d` over all pixels; `out` (N, C), any row stride."""
    raise NotImplementedError
