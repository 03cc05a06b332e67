"""Products of integer matrices: static, dynamic per token, and with weights of 4 bits."""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
from torch import Tensor

from qsweep.cuda import conv
from qsweep.cuda._launch import EXACT, check_offsets, default_tile, finish_arguments, power_of_two, round_up
from qsweep.cuda._parts import add_up, parts_of
from qsweep.cuda._rows import multiply_rows, multiply_w4, quantize_each_row
from qsweep.cuda.arithmetic import Requantize, Residual, Tile
from qsweep.errors import Refused
from qsweep.hub.ops import LEAST_SCALE

W4_DEPTH = 2**17
"""Inputs, at which weights are no longer read packed: sums are 16 times as large until they are complete."""


def pack_weight(weight: Tensor) -> Tensor:
    """Weights int8 (N, K) as `linear` reads them: int8 (N, KP), KP = K rounded up to 16, zeros past K."""
    return torch.nn.functional.pad(weight, (0, -weight.shape[1] % 16)).contiguous()


def linear(
    x: Tensor,
    weight: Tensor,
    requantize: Requantize,
    out: Tensor,
    *,
    residual: Residual | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """Write the product of `x` and the weights' transpose into `out`, and return it.

    `x`: int8 (M, K or KP), any row stride; columns past K may hold anything. `weight`: from `pack_weight`. `out`: int8
    where `requantize.output` is given, else float32, (M, N), any row stride. Loads take 16 bytes where the row stride
    and the columns of `x` are multiples of 16.
    """
    pixels = weight[None, :, None, None, :]
    conv.conv2d(_pixels(x), pixels, requantize, _pixels(out), residual=_residual(residual), tile=tile)
    return out


def linear_rows(
    rows: Tensor,
    row_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out: Tensor,
    *,
    tile: Tile | None = None,
) -> Tensor:
    """Write (rows * row_scale) @ (weight * weight_scale).T + bias into `out`, and return it.

    `rows`, `row_scale`: from `quantize_rows`. `weight`: from `pack_weight`. `weight_scale`, `bias`: float32 (N,).
    `out`: (M, N), float32, bfloat16 or float16, any row stride. The sums are exact; in float32, in this order:
    f32(sum) * row_scale * weight_scale + bias.
    """
    (count, depth), columns = rows.shape, len(weight)
    check_offsets(rows, weight, out)
    tile = tile or default_tile(count, columns, depth, depth)
    multiply_rows[(triton.cdiv(count, tile.rows) * triton.cdiv(columns, tile.columns),)](
        rows,
        weight,
        row_scale,
        weight_scale,
        weight_scale if bias is None else bias,
        out,
        M=count,
        q_n=rows.stride(0),
        y_n=out.stride(0),
        N=columns,
        K=depth,
        BM=tile.rows,
        BN=tile.columns,
        BK=tile.depth,
        BIAS=bias is not None,
        num_warps=tile.warps,
        num_stages=tile.stages,
        **EXACT,
    )
    return out


def quantize_rows(x: Tensor, rows: Tensor, scale: Tensor, *, high: int = 127) -> None:
    """Write float rows `x` as integers to `rows`, each on a symmetric grid of its own, zeros past K, and to `scale`.

    `x`: float32, bfloat16 or float16 (M, K), any row stride. `rows`: int8 (M, KP), KP = K rounded up to 16. `scale`:
    float32 (M,). scale = max|x| / high, q = round(x * (1 / scale)) within +-high. Rows whose scale would be under
    2^-102 become all 0 with scale 1 (their inverse would overflow); a NaN or infinity in a row makes its scale NaN, and
    so its results.
    """
    (count, depth), padded = x.shape, rows.shape[1]
    assert padded == round_up(depth, 16)
    assert x.stride(1) == 1
    check_offsets(x)
    block = min(4096, power_of_two(padded))
    quantize_each_row[(count,)](
        x,
        rows,
        scale,
        float(high),
        x.stride(0),
        padded,
        K=depth,
        KP=padded,
        SMALLEST=LEAST_SCALE,
        BK=block,
        **EXACT,
    )


def pack_weight4(weight: Tensor) -> Tensor:
    """Weights in [-8, 7], int8 (N, K), as `linear_w4` reads them: two a byte, int8 (N, KP/2), KP a multiple of 32.

    Byte j holds column j in its lower half and column j + KP/2 in its upper.
    """
    padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % 32))
    lower, upper = padded.chunk(2, dim=1)
    return ((lower & 15) | (upper << 4)).contiguous()


def linear_w4(
    x: Tensor,
    weight: Tensor,
    requantize: Requantize,
    out: Tensor,
    *,
    residual: Residual | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """As `linear`, weights from `pack_weight4`, unpacked in the kernel.

    Raises `Refused` for `W4_DEPTH` columns of `x` and more.
    """
    (count, depth), (columns, half) = x.shape, weight.shape
    if 2 * half >= W4_DEPTH:
        raise Refused(f"a linear with weights of 4 bits: must have fewer than {W4_DEPTH} inputs (got {2 * half})")
    check_offsets(x, weight, out)
    arguments = finish_arguments(requantize, _residual(residual), _pixels(out))
    tile = tile or default_tile(count, columns, half, half)
    split, parts = parts_of(tile, half, count, columns, x.device)
    multiply_w4[triton.cdiv(count, tile.rows) * triton.cdiv(columns, tile.columns), split](
        x,
        weight,
        M=count,
        x_n=x.stride(0),
        N=columns,
        K=min(depth, 2 * half),
        HALF=half,
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
    return out


def _pixels(matrix: Tensor) -> Tensor:
    """Rows as samples of one pixel: (M, K) -> (M, 1, 1, K)."""
    return matrix[:, None, None, :]


def _residual(residual: Residual | None) -> Residual | None:
    return residual and replace(residual, values=_pixels(residual.values))
