"""Kernels of fake quantization: onto the grid, and what passes back.

Launch all of them with `enable_fp_fusion=False`, as in `_finish`.
"""

import triton
import triton.language as tl

_MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2^23: v + _MAGIC has no room for fractions of |v| < 2^22
_LARGE = tl.constexpr(4194304.0)


@triton.jit
def _nearest(v):
    """Half to even; no call of a library, which the interpreter lacks."""
    return tl.where(tl.abs(v) < _LARGE, (v + _MAGIC) - _MAGIC, v)


@triton.jit
def _between(v, low, high):
    """NaN stays NaN."""
    v = tl.where(v < low, low, v)
    return tl.where(v > high, high, v)


@triton.jit
def _narrow(v, NARROW: tl.constexpr):
    """float32 to the nearest bf16, half to even, still as float32: the interpreter's own conversion cuts off."""
    if NARROW:
        bits = v.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        v = tl.where(v == v, bits.to(tl.float32, bitcast=True), v)
    return v


@triton.jit
def _scaled(v, scale, bottom, MOVING: tl.constexpr, NARROW: tl.constexpr):
    """Values in steps, and their nearest levels, both less `bottom` where that moves."""
    ratio = _narrow(v * tl.div_rn(1.0, scale), NARROW)
    level = _nearest(ratio)
    if MOVING:
        ratio, level = _narrow(ratio - bottom, NARROW), _narrow(level - bottom, NARROW)
    return ratio, level


@triton.jit
def round_to_grid(
    values_ptr, outputs_ptr, scale_ptr, bottom_ptr, bottom, steps, columns, blocks, bottom_stride,
    MOVING: tl.constexpr, NARROW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) // blocks
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    places, mask = row * columns + column, column < columns
    scale = tl.load(scale_ptr + row)
    low = bottom
    if MOVING:
        bottom = tl.load(bottom_ptr + row * bottom_stride)
        low = 0.0
    v = tl.load(values_ptr + places, mask=mask, other=0.0).to(tl.float32)
    _, level = _scaled(v, scale, bottom, MOVING, NARROW)
    level = _between(level, low, low + steps)
    if MOVING:
        level = _narrow(level + bottom, NARROW)
    tl.store(outputs_ptr + places, _narrow(level * scale, NARROW).to(outputs_ptr.dtype.element_ty), mask=mask)


@triton.jit
def step_backward(
    gradient_ptr, values_ptr, passed_ptr, step_ptr, beyond_ptr, under, over,
    scale_ptr, bottom_ptr, bottom, steps, columns, blocks, bottom_stride,
    MOVING: tl.constexpr, NARROW: tl.constexpr, BLOCK: tl.constexpr, SUMS: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """The gradient that passes, and the block's sums: of the step's gradient, of what stops."""
    row = tl.program_id(0) // blocks
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    places, mask = row * columns + column, column < columns
    scale = tl.load(scale_ptr + row)
    low = bottom
    if MOVING:
        bottom = tl.load(bottom_ptr + row * bottom_stride)
        low = 0.0
    v = tl.load(values_ptr + places, mask=mask, other=0.0).to(tl.float32)
    gradient = tl.load(gradient_ptr + places, mask=mask, other=0.0)
    ratio, level = _scaled(v, scale, bottom, MOVING, NARROW)
    high = low + steps
    passed = tl.where((ratio <= low - under) | (ratio >= high + over), 0.0, gradient)
    tl.store(passed_ptr + places, passed.to(passed_ptr.dtype.element_ty), mask=mask)
    if SUMS:
        level, wide, through = _between(level, low, high), gradient.to(tl.float32), passed.to(tl.float32)
        if MOVING and not OFFSET:  # with a learned offset, its own gradient holds what the ends add
            level, ratio = level + bottom, ratio + bottom
        tl.store(step_ptr + tl.program_id(0), tl.sum(wide * level - through * ratio, 0))
        if OFFSET:
            tl.store(beyond_ptr + tl.program_id(0), tl.sum(wide - through, 0))


@triton.jit
def clip_backward(
    gradient_ptr, values_ptr, low_ptr, high_ptr, passed_ptr, lowered_ptr, raised_ptr, columns,
    NARROW: tl.constexpr, BLOCK: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """The gradient that passes, and the block's sums: of the lower end's gradient, of the upper end's."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = column < columns
    low, high = tl.load(low_ptr), tl.load(high_ptr)
    v = tl.load(values_ptr + column, mask=mask, other=0.0).to(tl.float32)
    gradient = tl.load(gradient_ptr + column, mask=mask, other=0.0)
    place = _narrow(_narrow(v - _narrow(low, NARROW), NARROW) * tl.div_rn(1.0, high - low), NARROW)
    passed = tl.where((place <= 0.0) | (place >= 1.0), 0.0, gradient)
    tl.store(passed_ptr + column, passed.to(passed_ptr.dtype.element_ty), mask=mask)
    if SUMS:
        wide, through = gradient.to(tl.float32), passed.to(tl.float32)
        raised = wide * _between(place, 0.0, 1.0) - through * place
        tl.store(raised_ptr + tl.program_id(0), tl.sum(raised, 0))
        tl.store(lowered_ptr + tl.program_id(0), tl.sum(wide - through - raised, 0))
