"""What every kernel does with its exact sums: the multiplier, the residual, the grid. Called inside kernels.

Launch all kernels with `enable_fp_fusion=False`: a product and a sum that become one fused multiply-add round once
where the contract rounds twice.
"""

import triton
import triton.language as tl

_MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2^23: the bits of v + _MAGIC hold round_half_even(v) for |v| < 2^22
_MAGIC_BITS = tl.constexpr(0x4B400000)

NOT_SPECIALIZED = ["y_zero", "r_zero"]
"""A zero point of 1 would become a constant without `.to`, and every other would compile one more variant."""


@triton.jit
def nearest(v):
    """float32 -> int32, half to even; no libdevice call, which the interpreter lacks."""
    return (v + _MAGIC).to(tl.int32, bitcast=True) - _MAGIC_BITS


@triton.jit
def between(v, low, high):
    return tl.minimum(tl.maximum(v, low), high)


@triton.jit
def write(y_ptr, places, v, zero_point, low, high, mask):
    """Onto the grid where y is int8 (low and high are relative to the zero point), else v itself within bounds, if any.

    The bounds are integers, so clamping before rounding equals clamping after it.
    """
    if low is not None:
        v = between(v, low, high)
    if y_ptr.dtype.element_ty == tl.int8:
        tl.store(y_ptr + places, (nearest(v) + zero_point).to(tl.int8), mask=mask)
    else:
        tl.store(y_ptr + places, v.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def residual_of(r_ptr, places, mask, RESIDUAL: tl.constexpr):
    """What `finish` adds; load it before the sums, whose time then hides the memory's."""
    r = 0
    if RESIDUAL:
        r = tl.load(r_ptr + places, mask=mask, other=0)
    return r


@triton.jit
def finish(
    sums, channel, bias_ptr, multiplier_ptr, table_ptr, y_ptr, y_places, y_zero, low, high,
    r, r_zero, r_multiplier, own_low, own_high, own_multiplier, mask, column_mask,
    RESIDUAL: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    """From sums (rows, channels) to results; see `Requantize` and `Residual`."""
    bias = tl.load(bias_ptr + channel, mask=column_mask, other=0)
    multiplier = tl.load(multiplier_ptr + channel, mask=column_mask, other=0.0)
    v = (sums + bias[None, :]).to(tl.float32) * multiplier[None, :]
    if RESIDUAL:
        v = nearest(between(v, own_low, own_high)).to(tl.float32) * own_multiplier
        v = v + (r.to(tl.int32) - r_zero).to(tl.float32) * r_multiplier
    if TABLE:
        places = (nearest(between(v, low, high)) + (y_zero + 128)).to(tl.uint8)  # narrow before they change threads
        table = tl.load(table_ptr + tl.arange(0, 256))
        found = tl.gather(table, tl.ravel(places).to(tl.int32), 0)  # from shared memory: fewer steps to an address
        tl.store(y_ptr + y_places, tl.reshape(found, places.shape), mask=mask)
    else:
        write(y_ptr, y_places, v, y_zero, low, high, mask)


@triton.jit
def place(row, OH: tl.constexpr, OW: tl.constexpr):
    """Sample, line and pixel of an output row. The sizes are constants: division by them is a multiplication."""
    line = row // OW
    return line // OH, line % OH, row % OW
