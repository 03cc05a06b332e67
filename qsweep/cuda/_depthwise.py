"""Depthwise convolution: products on the CUDA cores, as a matrix product would be all zeros."""

import triton
import triton.language as tl

from qsweep.cuda._finish import NOT_SPECIALIZED, finish, place, residual_of


@triton.jit
def channels_of(places, channel, CP: tl.constexpr, BC: tl.constexpr):
    """Only channels are masked, and only where BC does not divide CP."""
    if CP % BC == 0:
        return tl.load(places).to(tl.int32)
    return tl.load(places, mask=(channel < CP)[None, :], other=0).to(tl.int32)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def convolve_depthwise(
    x_ptr, w_ptr, y_ptr, bias_ptr, multiplier_ptr, table_ptr, r_ptr, M, x_n, x_h, x_w, y_n, y_h, y_w, r_n, r_h, r_w,
    y_zero, low, high, r_zero, r_multiplier, own_low, own_high, own_multiplier,
    OH: tl.constexpr, OW: tl.constexpr, C: tl.constexpr, CP: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    FOURS: tl.constexpr, SLIDE: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, RESIDUAL: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    """Rows are four output pixels beside each other, FOURS in a line; w is int32 (KH, KW, CP).

    Bound by what makes numbers of bytes: four pixels share each weight, and, SLIDE, each input but the outermost. The
    last four of a line overlap those before where they would reach past its end.
    """
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    n, oh, four = place(tl.minimum(row, M - 1), OH, FOURS)
    first = tl.maximum(tl.minimum(four * 4, OW - 4), 0)
    second, third = tl.minimum(first + 1, OW - 1), tl.minimum(first + 2, OW - 1)
    fourth = tl.minimum(first + 3, OW - 1)
    line = x_ptr + (n * x_n + oh * SH * x_h)[:, None] + channel[None, :]
    a0, a1 = line + (first * SW * x_w)[:, None], line + (second * SW * x_w)[:, None]
    a2, a3 = line + (third * SW * x_w)[:, None], line + (fourth * SW * x_w)[:, None]
    acc0 = tl.zeros((BM, BC), dtype=tl.int32)
    acc1, acc2, acc3 = acc0, acc0, acc0
    for kh in range(KH):  # in a static_range all loads come first, and 5 x 5 filters spill registers
        down = kh * DH * x_h
        if SLIDE:
            x0 = channels_of(a0 + down, channel, CP, BC)
            x1 = channels_of(a1 + down, channel, CP, BC)
            x2 = channels_of(a2 + down, channel, CP, BC)
        for kw in tl.static_range(KW):
            there = down + kw * DW * x_w
            if not SLIDE:
                x0 = channels_of(a0 + there, channel, CP, BC)
                x1 = channels_of(a1 + there, channel, CP, BC)
                x2 = channels_of(a2 + there, channel, CP, BC)
            x3 = channels_of(a3 + there, channel, CP, BC)
            weights = channels_of(w_ptr + ((kh * KW + kw) * CP + channel)[None, :], channel, CP, BC)
            acc0 += x0 * weights
            acc1 += x1 * weights
            acc2 += x2 * weights
            acc3 += x3 * weights
            if SLIDE:
                x0, x1, x2 = x1, x2, x3
    mask = (row < M)[:, None] & (channel < C)[None, :]
    y_line, r_line = (n * y_n + oh * y_h)[:, None] + channel[None, :], (n * r_n + oh * r_h)[:, None] + channel[None, :]
    for pixel in tl.static_range(4):
        ow = (first, second, third, fourth)[pixel]
        sums = (acc0, acc1, acc2, acc3)[pixel]
        r = residual_of(r_ptr, r_line + (ow * r_w)[:, None], mask, RESIDUAL)
        finish(
            sums, channel, bias_ptr, multiplier_ptr, table_ptr, y_ptr, y_line + (ow * y_w)[:, None], y_zero, low, high,
            r, r_zero, r_multiplier, own_low, own_high, own_multiplier, mask, channel < C, RESIDUAL, TABLE,
        )  # fmt: skip
