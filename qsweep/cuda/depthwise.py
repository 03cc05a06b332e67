"""Depthwise convolution of integers: one filter a channel, on the CUDA cores."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from qsweep.cuda._depthwise import convolve_depthwise
from qsweep.cuda._launch import EXACT, check_offsets, finish_arguments, power_of_two, round_up
from qsweep.cuda.arithmetic import Requantize, Residual, Tile

_TOGETHER = 4
"""Pixels of a row: as the kernel has it."""


def pack_weight(weight: Tensor, groups: int, channels: int | None = None) -> Tensor:
    """Weights int8 (C, 1, KH, KW), `groups` C, as `conv2d` reads them: int32 (KH, KW, CP), as they are multiplied.

    `channels`: CP, how many channels the input buffer has; None: C rounded up to 16.
    """
    assert len(weight) == groups and weight.shape[1] == 1
    wanted = channels or round_up(groups, 16)
    return torch.nn.functional.pad(weight[:, 0].permute(1, 2, 0), (0, wanted - groups)).int().contiguous()


def rows_of(out: Tensor) -> int:
    """Of `out` (N, OH, OW, C): pixels, four of a line at a time."""
    count, lines, width = out.shape[:3]
    return count * lines * -(-width // _TOGETHER)


def conv2d(
    x: Tensor,
    weight: Tensor,
    requantize: Requantize,
    out: Tensor,
    *,
    stride: tuple[int, int] = (1, 1),
    dilation: tuple[int, int] = (1, 1),
    groups: int,
    residual: Residual | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """As `qsweep.cuda.conv.conv2d`, with as many groups, input and output channels.

    Of `tile` only `rows`, which are four pixels each, `columns` and `warps` count.
    """
    height_kernel, width_kernel, channels = weight.shape
    assert groups == out.shape[3]
    assert x.shape[3] >= channels and x.stride(3) == 1
    check_offsets(x, out)
    tile = tile or Tile(32, min(64, power_of_two(channels)), 32)
    rows, width = rows_of(out), out.shape[2]
    convolve_depthwise[triton.cdiv(rows, tile.rows), triton.cdiv(channels, tile.columns)](
        x,
        weight,
        M=rows,
        x_n=x.stride(0),
        x_h=x.stride(1),
        x_w=x.stride(2),
        C=groups,
        CP=channels,
        KH=height_kernel,
        KW=width_kernel,
        SH=stride[0],
        SW=stride[1],
        DH=dilation[0],
        DW=dilation[1],
        FOURS=triton.cdiv(width, _TOGETHER),
        SLIDE=stride[1] == dilation[1] == 1 and width >= _TOGETHER,
        BM=tile.rows,
        BC=tile.columns,
        num_warps=tile.warps,
        num_stages=1,
        **finish_arguments(requantize, residual, out),
        **EXACT,
    )
    return out
