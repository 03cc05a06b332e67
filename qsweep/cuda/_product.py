"""The integer matrix product that dense and grouped convolutions and linears are, and the end of a split one."""

import triton
import triton.language as tl

from qsweep.cuda._finish import NOT_SPECIALIZED, finish, place, residual_of


@triton.jit
def block_of(number, M, COLUMN_BLOCKS: tl.constexpr, BM: tl.constexpr):
    """Row and column block of a program: 8 row blocks share each column block, so that the cache serves both."""
    width: tl.constexpr = 8 * COLUMN_BLOCKS
    first = number // width * 8
    height = tl.minimum(tl.cdiv(M, BM) - first, 8)
    return first + number % width % height, number % width // height


@triton.jit
def sums_of(
    a, b, x_h, x_w, part,
    K: tl.constexpr, CG: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Sums (BM, BN) over this part of the K products in the order (kh, kw, channel).

    `a` (BM, 1) points at each row's first input, `b` (1, BN) at each column's first weight. Neither needs a mask where
    BK divides K: rows and columns past the end repeat the last one, and padding is in the buffer.
    """
    k = tl.arange(0, BK)
    STEPS: tl.constexpr = (K + BK - 1) // BK
    EACH: tl.constexpr = (STEPS + SPLIT - 1) // SPLIT
    acc = tl.zeros((BM, BN), dtype=tl.int32)
    first, last = part * EACH, STEPS
    if SPLIT > 1:
        last = tl.minimum(first + EACH, STEPS)
    for step in range(first, last):
        weights = b + (step * BK + k)[:, None]
        if CG % BK == 0:  # a step lies within one tap: its place is a scalar
            tap = step // (CG // BK)
            start = tap // KW * DH * x_h + tap % KW * DW * x_w + step % (CG // BK) * BK
            inputs = a + (start + k)[None, :]
        else:
            tap = (step * BK + k) // CG
            inputs = a + (tap // KW * DH * x_h + tap % KW * DW * x_w + (step * BK + k) % CG)[None, :]
        if K % BK == 0:
            acc = tl.dot(tl.load(inputs), tl.load(weights), acc, out_dtype=tl.int32)
        else:
            inside = step * BK + k < K
            left = tl.load(inputs, mask=inside[None, :], other=0)
            acc = tl.dot(left, tl.load(weights, mask=inside[:, None], other=0), acc, out_dtype=tl.int32)
    return acc


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def convolve(
    x_ptr, w_ptr, y_ptr, bias_ptr, multiplier_ptr, table_ptr, r_ptr, M, x_n, x_h, x_w, y_n, y_h, y_w, r_n, r_h, r_w,
    y_zero, low, high, r_zero, r_multiplier, own_low, own_high, own_multiplier,
    UNIT: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr, OCG: tl.constexpr, K: tl.constexpr, CG: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr,
    RESIDUAL: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    """M = N * OH * OW rows times OCG columns of a group. A linear is OH = OW = KH = KW = 1.

    Strides of x count UNITs, so that the compiler knows what divides its addresses: 16-byte loads need 16, and images
    of 4 channels get loads of a pixel or two instead of single bytes.
    SPLIT > 1: y is int32 (SPLIT, M, OC), its parts' sums, for `finish_parts`.
    """
    COLUMN_BLOCKS: tl.constexpr = (OCG + BN - 1) // BN
    row_block, column_block = block_of(tl.program_id(0), M, COLUMN_BLOCKS, BM)
    group = tl.program_id(1)
    part = 0
    if SPLIT > 1:
        part = tl.program_id(2)
    row = row_block * BM + tl.arange(0, BM)
    column = column_block * BN + tl.arange(0, BN)
    n, oh, ow = place(tl.minimum(row, M - 1), OH, OW)
    x_n, x_h, x_w = x_n * UNIT, x_h * UNIT, x_w * UNIT
    a = x_ptr + (group * CG + n * x_n + oh * SH * x_h + ow * SW * x_w)[:, None]
    b = w_ptr + ((group * OCG + tl.minimum(column, OCG - 1)) * (KH * KW * CG))[None, :]
    mask = (row < M)[:, None]
    if OCG % BN != 0:
        mask = mask & (column < OCG)[None, :]
    channel = group * OCG + column
    r_places = (n * r_n + oh * r_h + ow * r_w)[:, None] + channel[None, :]
    SHORT: tl.constexpr = KH * KW == 1  # the sums of a 3 x 3 hide little of it, and want the registers
    r = residual_of(r_ptr, r_places, mask, RESIDUAL and SHORT and SPLIT == 1)
    acc = sums_of(a, b, x_h, x_w, part, K, CG, KH, KW, DH, DW, BM, BN, BK, SPLIT)
    if SPLIT > 1:
        OC = tl.num_programs(1) * OCG
        tl.store(y_ptr + (part * M + row)[:, None] * OC + channel[None, :], acc, mask=mask)
    else:
        y_places = (n * y_n + oh * y_h + ow * y_w)[:, None] + channel[None, :]
        if not SHORT:
            r = residual_of(r_ptr, r_places, mask, RESIDUAL)
        finish(
            acc, channel, bias_ptr, multiplier_ptr, table_ptr, y_ptr, y_places, y_zero, low, high,
            r, r_zero, r_multiplier, own_low, own_high, own_multiplier, mask, column < OCG, RESIDUAL, TABLE,
        )  # fmt: skip


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def finish_parts(
    parts_ptr, y_ptr, bias_ptr, multiplier_ptr, table_ptr, r_ptr, M, y_n, y_h, y_w, r_n, r_h, r_w,
    y_zero, low, high, r_zero, r_multiplier, own_low, own_high, own_multiplier,
    OH: tl.constexpr, OW: tl.constexpr, OC: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr, RESIDUAL: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    """Add the parts of a split product, int32 (SPLIT, M, OC), and finish them."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    channel = tl.program_id(1) * BN + tl.arange(0, BN)
    mask = (row < M)[:, None] & (channel < OC)[None, :]
    n, oh, ow = place(row, OH, OW)
    y_places = (n * y_n + oh * y_h + ow * y_w)[:, None] + channel[None, :]
    r = residual_of(r_ptr, (n * r_n + oh * r_h + ow * r_w)[:, None] + channel[None, :], mask, RESIDUAL)
    acc = tl.zeros((BM, BN), dtype=tl.int32)
    for part in tl.static_range(SPLIT):
        acc += tl.load(parts_ptr + (part * M + row)[:, None] * OC + channel[None, :], mask=mask, other=0)
    finish(
        acc, channel, bias_ptr, multiplier_ptr, table_ptr, y_ptr, y_places, y_zero, low, high,
        r, r_zero, r_multiplier, own_low, own_high, own_multiplier, mask, channel < OC, RESIDUAL, TABLE,
    )  # fmt: skip
