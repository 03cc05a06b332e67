"""Two-dimensional convolution of integers, dense and grouped, as an implicit matrix product."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import triton
from torch import Tensor

from qsweep.cuda._launch import EXACT, check_offsets, default_tile, finish_arguments, round_up
from qsweep.cuda._parts import add_up, parts_of
from qsweep.cuda._product import convolve
from qsweep.cuda.arithmetic import Requantize, Residual, Tile


def pack_weight(weight: Tensor, groups: int = 1, channels: int | None = None) -> Tensor:
    """Weights int8 (OC, C/groups, KH, KW) as `conv2d` reads them: int8 (G, OC/G, KH, KW, CG), contiguous.

    `channels`: how many channels the input buffer has, a multiple of 4; the weights of those past C are 0. None: C
    rounded up to 16, or 4 for at most 4 channels (images). Groups too narrow for 16-byte loads are joined, with
    zeros between them, so that G <= groups and CG is a multiple of 16 unless G is 1.
    """
    out_channels, width, height_kernel, width_kernel = weight.shape
    together = _joined(groups, width, out_channels // groups)
    apart = groups // together
    taps = weight.permute(0, 2, 3, 1).reshape(apart, together, -1, height_kernel, width_kernel, width)
    side = torch.eye(together, dtype=torch.int8, device=weight.device)
    blocks = taps.unsqueeze(-2) * side.view(1, together, 1, 1, 1, together, 1)  # (G, group, OC, KH, KW, group, C)
    packed = blocks.reshape(apart, -1, height_kernel, width_kernel, together * width)
    given = packed.shape[-1]
    wanted = given if apart > 1 else channels or (4 if given <= 4 else round_up(given, 16))
    assert wanted >= given
    return torch.nn.functional.pad(packed, (0, wanted - given)).contiguous()


def _joined(groups: int, width: int, out_width: int) -> int:
    """How many groups become one: the fewest that fill 16 input and 16 output channels, else all."""
    fits = [n for n in range(1, groups) if groups % n == 0 and width * n % 16 == 0 and out_width * n >= 16]
    return fits[0] if fits else groups


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
    assert groups % weight.shape[0] == 0
    assert x.stride(3) == 1 or x.shape[3] == 1
    check_offsets(x, out, weight)
    apart, columns, height_kernel, width_kernel, channels = weight.shape
    depth = height_kernel * width_kernel * channels
    assert x.shape[3] >= apart * channels or depth == channels
    result = out
    if height_kernel == width_kernel == 1 and stride == (1, 1):
        x, out, residual = _as_rows(x, out, residual)
    arguments = finish_arguments(requantize, residual, out)
    rows = out.shape[0] * out.shape[1] * out.shape[2]
    tile = tile or default_tile(rows, columns, depth, channels)
    split, parts = parts_of(tile, depth, rows, out.shape[3], x.device)
    unit = math.gcd(16, *x.stride()[:3])
    grid = (triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns), apart, split)
    convolve[grid](
        x,
        weight,
        M=rows,
        x_n=x.stride(0) // unit,
        x_h=x.stride(1) // unit,
        x_w=x.stride(2) // unit,
        UNIT=unit,
        OCG=columns,
        K=min(depth, x.shape[3]) if height_kernel == width_kernel == 1 and apart == 1 else depth,
        CG=channels,
        KH=height_kernel,
        KW=width_kernel,
        SH=stride[0],
        SW=stride[1],
        DH=dilation[0],
        DW=dilation[1],
        BM=tile.rows,
        BN=tile.columns,
        BK=tile.depth,
        SPLIT=split,
        num_warps=tile.warps,
        num_stages=tile.stages,
        **(arguments if parts is None else arguments | {"y_ptr": parts}),
        **EXACT,
    )
    if parts is not None:
        add_up(parts, arguments)
    return result


def _as_rows(x: Tensor, out: Tensor, residual: Residual | None) -> tuple[Tensor, Tensor, Residual | None]:
    """A pointwise convolution of tensors without halos is a product of matrices: (N * H * W, 1, 1, C) each."""
    x = x[:, : out.shape[1], : out.shape[2]]
    tensors = [x, out] if residual is None else [x, out, residual.values]
    if not all(_one_stride(tensor) for tensor in tensors):
        return x, out, residual
    rows = [
        tensor.as_strided((tensor.shape[:3].numel(), 1, 1, tensor.shape[3]), _row_strides(tensor)) for tensor in tensors
    ]
    return rows[0], rows[1], residual and replace(residual, values=rows[2])


def _one_stride(tensor: Tensor) -> bool:
    """Whether its pixels lie at equal distances."""
    _, height, width, _ = tensor.shape
    n, h, w, _ = tensor.stride()
    return (height == 1 or h == width * w) and (tensor.shape[0] == 1 or n == height * width * w)


def _row_strides(tensor: Tensor) -> tuple[int, int, int, int]:
    row = tensor.stride(2)
    return row, row, row, tensor.stride(3)
