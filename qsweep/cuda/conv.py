"""Two-dimensional convolution of integers, dense and grouped, as an implicit matrix product."""

from __future__ import annotations

from torch import Tensor

from qsweep.cuda.arithmetic import Requantize, Residual, Tile


def pack_weight(weight: Tensor, groups: int = 1, channels: int | None = None) -> Tensor:
    """Weights int8 (OC, C/groups, KH, KW) as `conv2d` reads them: int8 (G, OC/G, KH, KW, CG), contiguous.

    `channels`: how many channels the input buffer has, a multiple of 4; the weights of those past C are 0. None: C
    rounded up to 16, or 4 for at most 4 channels (images). Groups too narrow for 16-byte loads are joined, with
    zeros between them, so that G <= groups and CG is a multiple of 16 unless G is 1.
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
    groups: int = 1,
    residual: Residual | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """Write the convolution of `x` into `out`, and return it.

    `x`: int8 (N, H, W, CP), any strides but 1 along the channels, with its halo: pixels of padding hold the input's
    zero point, so that H >= (OH - 1) * stride + (KH - 1) * dilation + 1. CP is the `channels` that `pack_weight` was
    told; channels past C may hold anything. `weight`: from `pack_weight` with the same `groups`. `out`: int8 where
    `requantize.output` is given, else float32, (N, OH, OW, OC), channel stride 1; nothing outside of it is written.
    Loads take 16 bytes where CP and the strides are multiples of 16.
    """
    raise NotImplementedError
