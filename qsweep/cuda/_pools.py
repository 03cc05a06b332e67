"""Pools: maxima and exact sums over windows. Pixels outside the input are masked, so that no halo is needed."""

import triton
import triton.language as tl

from qsweep.cuda._finish import place, write


@triton.jit(do_not_specialize=["lowest"])
def max_windows(
    x_ptr, y_ptr, lowest, M, H, W, C, x_n, x_h, x_w, y_n, y_h, y_w,
    OH: tl.constexpr, OW: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """`lowest` is -128, and no constant: of `other=-128` Triton 3.6 and 3.7 make words of 80 ff ff ff."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    n, oh, ow = place(row, OH, OW)
    lowest = lowest.to(tl.int8)
    largest = tl.full((BM, BC), -128, dtype=tl.int8)
    for kh in tl.static_range(KH):
        for kw in tl.static_range(KW):
            ih, iw = oh * SH - PH + kh * DH, ow * SW - PW + kw * DW
            inside = (row < M) & (ih >= 0) & (ih < H) & (iw >= 0) & (iw < W)
            places = (n * x_n + ih * x_h + iw * x_w)[:, None] + channel[None, :]
            x = tl.load(x_ptr + places, mask=inside[:, None] & (channel < C)[None, :], other=lowest)
            largest = tl.maximum(largest, x)
    places = (n * y_n + oh * y_h + ow * y_w)[:, None] + channel[None, :]
    tl.store(y_ptr + places, largest, mask=(row < M)[:, None] & (channel < C)[None, :])


@triton.jit(do_not_specialize=["lowest"])
def max_all(
    x_ptr, y_ptr, lowest, H, C, x_n, x_h, x_w, y_n, W: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """One program a sample and block of channels; `lowest` as above."""
    n = tl.program_id(0)
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    lowest = lowest.to(tl.int8)
    largest = tl.full((BP, BC), -128, dtype=tl.int8)
    for start in range(0, H * W, BP):
        pixel = start + tl.arange(0, BP)
        inside = (pixel < H * W)[:, None] & (channel < C)[None, :]
        places = (n * x_n + pixel // W * x_h + pixel % W * x_w)[:, None] + channel[None, :]
        largest = tl.maximum(largest, tl.load(x_ptr + places, mask=inside, other=lowest))
    found = tl.max(largest.to(tl.int32), axis=0).to(tl.int8)
    tl.store(y_ptr + n * y_n + channel, found, mask=channel < C)


@triton.jit(do_not_specialize=["x_zero", "y_zero"])
def average_windows(
    x_ptr, y_ptr, x_zero, multiplier, y_zero, low, high, M, H, W, C, x_n, x_h, x_w, y_n, y_h, y_w,
    OH: tl.constexpr, OW: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    n, oh, ow = place(row, OH, OW)
    sums = tl.zeros((BM, BC), dtype=tl.int32)
    for kh in tl.static_range(KH):
        for kw in tl.static_range(KW):
            ih, iw = oh * SH - PH + kh, ow * SW - PW + kw
            inside = ((row < M) & (ih >= 0) & (ih < H) & (iw >= 0) & (iw < W))[:, None] & (channel < C)[None, :]
            places = (n * x_n + ih * x_h + iw * x_w)[:, None] + channel[None, :]
            x = tl.load(x_ptr + places, mask=inside, other=0).to(tl.int32)
            sums += tl.where(inside, x - x_zero, 0)
    places = (n * y_n + oh * y_h + ow * y_w)[:, None] + channel[None, :]
    mask = (row < M)[:, None] & (channel < C)[None, :]
    write(y_ptr, places, sums.to(tl.float32) * multiplier, y_zero, low, high, mask)


@triton.jit(do_not_specialize=["x_zero", "y_zero"])
def average_all(
    x_ptr, y_ptr, x_zero, multiplier, y_zero, low, high, H, C, x_n, x_h, x_w, y_n,
    W: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """One program a sample and block of channels."""
    n = tl.program_id(0)
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    sums = tl.zeros((BP, BC), dtype=tl.int32)
    for start in range(0, H * W, BP):
        pixel = start + tl.arange(0, BP)
        inside = (pixel < H * W)[:, None] & (channel < C)[None, :]
        places = (n * x_n + pixel // W * x_h + pixel % W * x_w)[:, None] + channel[None, :]
        x = tl.load(x_ptr + places, mask=inside, other=0).to(tl.int32)
        sums += tl.where(inside, x - x_zero, 0)
    v = tl.sum(sums, axis=0).to(tl.float32) * multiplier
    write(y_ptr, n * y_n + channel, v, y_zero, low, high, channel < C)
