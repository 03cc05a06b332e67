"""Linears: rows on int8 grids of their own, and weights of 4 bits."""

import triton
import triton.language as tl

from qsweep.cuda._finish import NOT_SPECIALIZED, between, finish, nearest, residual_of
from qsweep.cuda._product import block_of, sums_of


@triton.jit
def quantize_each_row(x_ptr, q_ptr, scale_ptr, high, x_n, q_n, K, KP, SMALLEST: tl.constexpr, BK: tl.constexpr):
    """One program a row, read twice: first for its largest magnitude. `/` would be approximate on the GPU."""
    row = tl.program_id(0)
    k = tl.arange(0, BK)
    largest = tl.zeros((BK,), dtype=tl.float32)
    finite = tl.full((BK,), 1, dtype=tl.int32)
    for start in range(0, K, BK):
        x = tl.abs(tl.load(x_ptr + row * x_n + start + k, mask=start + k < K, other=0.0).to(tl.float32))
        finite = tl.where(x < float("inf"), finite, 0)
        largest = tl.where(x > largest, x, largest)
    all_finite = tl.min(finite, axis=0) > 0
    nothing = tl.zeros((1,), tl.float32)
    scale = tl.div_rn(tl.max(largest, axis=0) + nothing, high + nothing)
    scale = tl.where((scale >= SMALLEST) & all_finite, scale, 1.0)
    inverse = tl.div_rn(tl.full((1,), 1.0, tl.float32), scale)
    for start in range(0, KP, BK):
        x = tl.load(x_ptr + row * x_n + start + k, mask=start + k < K, other=0.0).to(tl.float32)
        v = tl.where(all_finite & (tl.abs(x) < float("inf")), x * inverse, 0.0)
        q = nearest(between(v, -high, high)).to(tl.int8)
        tl.store(q_ptr + row * q_n + start + k, q, mask=start + k < KP)
    tl.store(scale_ptr + row + tl.arange(0, 1), tl.where(all_finite, scale, float("nan")))


@triton.jit
def multiply_rows(
    q_ptr, w_ptr, row_scale_ptr, scale_ptr, bias_ptr, y_ptr, M, q_n, y_n,
    N: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """f32(sum) * row_scale * scale + bias, rounded to float32 after each."""
    row_block, column_block = block_of(tl.program_id(0), M, (N + BN - 1) // BN, BM)
    row = row_block * BM + tl.arange(0, BM)
    column = column_block * BN + tl.arange(0, BN)
    a = q_ptr + (tl.minimum(row, M - 1) * q_n)[:, None]
    b = w_ptr + (tl.minimum(column, N - 1) * K)[None, :]
    acc = sums_of(a, b, 0, 0, 0, K, K, 1, 1, 1, 1, BM, BN, BK, 1)
    row_scale = tl.load(row_scale_ptr + row, mask=row < M, other=0.0)
    scale = tl.load(scale_ptr + column, mask=column < N, other=0.0)
    v = acc.to(tl.float32) * row_scale[:, None] * scale[None, :]
    if BIAS:
        v = v + tl.load(bias_ptr + column, mask=column < N, other=0.0)[None, :]
    mask = (row < M)[:, None] & (column < N)[None, :]
    tl.store(y_ptr + row[:, None] * y_n + column[None, :], v.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def half_sums_of(
    a, b, part, K: tl.constexpr, HALF: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """16 times the sums (BM, BN) of products with weights of 4 bits.

    The lower half of byte j is column j, the upper is column j + HALF: a block of bytes is two blocks of weights that
    meet two blocks of inputs, and nothing is interleaved. Shifted up by 4 bits the weights need no extension of their
    sign, which took 3 times the instructions.
    """
    k = tl.arange(0, BK)
    STEPS: tl.constexpr = (HALF + BK - 1) // BK
    EACH: tl.constexpr = (STEPS + SPLIT - 1) // SPLIT
    acc = tl.zeros((BM, BN), dtype=tl.int32)
    first, last = part * EACH, STEPS
    if SPLIT > 1:
        last = tl.minimum(first + EACH, STEPS)
    for step in range(first, last):
        at = step * BK + k
        if HALF % BK == 0 and K == 2 * HALF:
            left, right = tl.load(a + at[None, :]), tl.load(a + (HALF + at)[None, :])
            both = tl.load(b + at[:, None])
        else:
            inside = at < HALF
            left = tl.load(a + at[None, :], mask=(inside & (at < K))[None, :], other=0)
            right = tl.load(a + (HALF + at)[None, :], mask=(inside & (HALF + at < K))[None, :], other=0)
            both = tl.load(b + at[:, None], mask=inside[:, None], other=0)
        acc = tl.dot(left, both << 4, acc, out_dtype=tl.int32)
        acc = tl.dot(right, both & -16, acc, out_dtype=tl.int32)
    return acc


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def multiply_w4(
    x_ptr, w_ptr, y_ptr, bias_ptr, multiplier_ptr, table_ptr, r_ptr, M, x_n, y_n, y_h, y_w, r_n, r_h, r_w,
    y_zero, low, high, r_zero, r_multiplier, own_low, own_high, own_multiplier,
    OH: tl.constexpr, OW: tl.constexpr, N: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr,
    RESIDUAL: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    """Integers times weights of 4 bits. SPLIT > 1: y is int32 (SPLIT, M, N), for `finish_parts`."""
    row_block, column_block = block_of(tl.program_id(0), M, (N + BN - 1) // BN, BM)
    part = 0
    if SPLIT > 1:
        part = tl.program_id(1)
    row = row_block * BM + tl.arange(0, BM)
    column = column_block * BN + tl.arange(0, BN)
    a = x_ptr + (tl.minimum(row, M - 1) * x_n)[:, None]
    b = w_ptr + (tl.minimum(column, N - 1) * HALF)[None, :]
    acc = half_sums_of(a, b, part, K, HALF, BM, BN, BK, SPLIT) >> 4
    mask = (row < M)[:, None] & (column < N)[None, :]
    if SPLIT > 1:
        tl.store(y_ptr + (part * M + row)[:, None] * N + column[None, :], acc, mask=mask)
    else:
        y_places = (row * y_n)[:, None] + column[None, :]
        r = residual_of(r_ptr, (row * r_n)[:, None] + column[None, :], mask, RESIDUAL)
        finish(
            acc, column, bias_ptr, multiplier_ptr, table_ptr, y_ptr, y_places, y_zero, low, high,
            r, r_zero, r_multiplier, own_low, own_high, own_multiplier, mask, column < N, RESIDUAL, TABLE,
        )  # fmt: skip
