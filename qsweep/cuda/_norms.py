"""Layer norm of rows that fit one block each, from integers or floats, onto a grid; and a sum before it onto one."""

import triton
import triton.language as tl

from qsweep.cuda._finish import write


@triton.jit
def load_side(x_ptr, zero_point, places, mask):
    """In units of the scale; 0 past the ends of rows."""
    if x_ptr.dtype.element_ty == tl.int8:
        return tl.load(x_ptr + places, mask=mask, other=zero_point).to(tl.float32) - zero_point.to(tl.float32)
    return tl.load(x_ptr + places, mask=mask, other=0).to(tl.float32)


@triton.jit(do_not_specialize=["left_zero", "right_zero", "y_zero", "t_zero"])
def normalize_rows(
    left_ptr, right_ptr, weight_ptr, bias_ptr, y_ptr, total_ptr, invalid_ptr,
    left_zero, left_scale, right_zero, right_scale, y_zero, low, high, epsilon, share,
    left_multiplier, right_multiplier, t_zero, t_low, t_high,
    R, D, l_row, r_row, y_row, t_row,
    BOTH: tl.constexpr, TOTAL: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr, TURNS: tl.constexpr,
):  # fmt: skip
    """`share` is 1 / D; weights and bias are finite, in units of y's scale.

    Bound by its instructions: what is not held to the bit is multiplied and added in one, a NaN is looked for in what
    it makes of its row, and weights, which come through shared memory, serve several rows.
    """
    column = tl.arange(0, BD)
    weight = tl.load(weight_ptr + column, mask=column < D, other=0.0)
    bias = tl.load(bias_ptr + column, mask=column < D, other=0.0)
    bad = tl.zeros((BR,), dtype=tl.int32)
    for turn in range(TURNS):
        row = (tl.program_id(0) * TURNS + turn) * BR + tl.arange(0, BR)
        mask = (row < R)[:, None] & (column < D)[None, :]
        left = load_side(left_ptr, left_zero, row[:, None] * l_row + column[None, :], mask)
        x = left * left_scale
        if BOTH:
            right = load_side(right_ptr, right_zero, row[:, None] * r_row + column[None, :], mask)
            x = tl.fma(right, right_scale, x)
            if TOTAL:
                total = left * left_multiplier + right * right_multiplier
                write(total_ptr, row[:, None] * t_row + column[None, :], total, t_zero, t_low, t_high, mask)
        mean = tl.sum(x, axis=1) * share
        centred = tl.where(mask, x - mean[:, None], 0.0)
        spread = tl.sqrt_rn(tl.sum(centred * centred, axis=1) * share + epsilon)  # the fast root flushes denormals
        narrow = tl.div_rn(tl.full(spread.shape, 1.0, tl.float32), spread)
        odd = mean * 0.0 + narrow * 0.0  # 0, but for infinities and NaNs
        bad = tl.where((odd != 0.0) & (row < R), 1, bad)
        v = tl.fma(centred * narrow[:, None], weight[None, :], bias[None, :])
        write(y_ptr, row[:, None] * y_row + column[None, :], v, y_zero, low, high, mask)
    tl.atomic_or(invalid_ptr + tl.zeros((BR,), tl.int32), 1, mask=bad > 0)
