"""Depthwise convolution of integers: one filter a channel, on the CUDA cores."""

from __future__ import annotations

from torch import Tensor

from qsweep.cuda.arithmetic import Requantize, Residual, Tile


def pack_weight(weight: Tensor, groups: int, channels: int | None = None) -> Tensor:
    """Weights int8 (C, 1, KH, KW), `groups` C, as `conv2d` reads them: int8 (KH, KW, CP).

    `channels`: CP, how many channels the input buffer has; None: C rounded up to 16.
    """
    raise NotImplementedError


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

    Of `tile` only `rows`, `columns` and `warps` count.
    """
    raise NotImplementedError
