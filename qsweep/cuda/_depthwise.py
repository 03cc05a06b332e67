"""Depthwise convolution: products on the CUDA cores, as a matrix product would be all zeros."""

import triton
import triton.language as tl

from qsweep.cuda._finish import NOT_SPECIALIZED, finish, place, residual_of


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def convolve_depthwise(
    x_ptr, w_ptr, y_ptr, bias_ptr, multiplier_ptr, table_ptr, r_ptr, M, x_n, x_h, x_w, y_n, y_h, y_w, r_n, r_h, r_w,
    y_zero, low, high, r_zero, r_multiplier, own_low, own_high, own_multiplier,
    OH: tl.constexpr, OW: tl.constexpr, C: tl.constexpr, CP: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, RESIDUAL: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    """Rows are output pixels; w is (KH, KW, CP). Only channels are masked, and only where BC does not divide CP."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    n, oh, ow = place(tl.minimum(row, M - 1), OH, OW)
    a = x_ptr + (n * x_n + oh * SH * x_h + ow * SW * x_w)[:, None] + channel[None, :]
    acc = tl.zeros((BM, BC), dtype=tl.int32)
    for kh in range(KH):  # in a static_range all loads come first, and 5 x 5 filters spill registers
        for kw in tl.static_range(KW):
            inputs = a + (kh * DH * x_h + kw * DW * x_w)
            weights = w_ptr + (kh * KW + kw) * CP + channel
            if CP % BC == 0:
                acc += tl.load(inputs).to(tl.int32) * tl.load(weights).to(tl.int32)[None, :]
            else:
                filters = tl.load(weights, mask=channel < CP, other=0).to(tl.int32)[None, :]
                acc += tl.load(inputs, mask=(channel < CP)[None, :], other=0).to(tl.int32) * filters
    mask = (row < M)[:, None] & (channel < C)[None, :]
    y_places = (n * y_n + oh * y_h + ow * y_w)[:, None] + channel[None, :]
    r = residual_of(r_ptr, (n * r_n + oh * r_h + ow * r_w)[:, None] + channel[None, :], mask, RESIDUAL)
    finish(
        acc, channel, bias_ptr, multiplier_ptr, table_ptr, y_ptr, y_places, y_zero, low, high,
        r, r_zero, r_multiplier, own_low, own_high, own_multiplier, mask, channel < C, RESIDUAL, TABLE,
    )  # fmt: skip
