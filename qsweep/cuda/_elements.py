"""Element by element: tensors of one shape as rows (A * B * C) of D elements, each tensor with its own strides."""

import triton
import triton.language as tl

from qsweep.cuda._finish import between, nearest, place, write

PLAIN = ["y_zero", "x_zero", "left_zero", "right_zero"]
"""Arguments that are not specialized, see `NOT_SPECIALIZED`."""


@triton.jit
def rows_and_columns(R, D, BR: tl.constexpr, BD: tl.constexpr):
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    column = tl.program_id(1) * BD + tl.arange(0, BD)
    return row, column, (row < R)[:, None] & (column < D)[None, :]


@triton.jit
def places_of(row, column, B, C, s_a, s_b, s_c, s_d):
    line = row // C
    return (line // B * s_a + line % B * s_b + row % C * s_c)[:, None] + (column * s_d)[None, :]


@triton.jit(do_not_specialize=PLAIN)
def quantize_elements(
    x_ptr, y_ptr, invalid_ptr, inverse, y_zero, low, high, R, B, C, D, x_a, x_b, x_c, x_d, y_a, y_b, y_c, y_d,
    FLAG: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    row, column, mask = rows_and_columns(R, D, BR, BD)
    x = tl.load(x_ptr + places_of(row, column, B, C, x_a, x_b, x_c, x_d), mask=mask, other=0).to(tl.float32)
    v = tl.where(x == x, x * inverse, low)
    if FLAG:
        bad = tl.max(tl.max((x != x).to(tl.int32), axis=1), axis=0)
        tl.atomic_or(invalid_ptr, 1, mask=bad > 0)
    write(y_ptr, places_of(row, column, B, C, y_a, y_b, y_c, y_d), v, y_zero, low, high, mask)


@triton.jit(do_not_specialize=PLAIN)
def quantize_pixels(
    x_ptr, words_ptr, invalid_ptr, inverse, y_zero, low, high, M, x_n, x_c, x_h, x_w, y_n, y_h, y_w,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, FLAG: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Up to four channels of a pixel as one word, the first in its lowest byte; the bytes of no channel are 0."""
    pixel = tl.program_id(0) * BM + tl.arange(0, BM)
    mask = pixel < M
    n, h, w = place(pixel, H, W)
    word = tl.zeros((BM,), dtype=tl.int32)
    bad = tl.zeros((BM,), dtype=tl.int32)
    for c in tl.static_range(C):
        x = tl.load(x_ptr + n * x_n + c * x_c + h * x_h + w * x_w, mask=mask, other=0).to(tl.float32)
        bad = tl.where(x == x, bad, 1)
        v = between(tl.where(x == x, x * inverse, low), low, high)
        word = word | (((nearest(v) + y_zero) & 255) << (8 * c))
    if FLAG:
        tl.atomic_or(invalid_ptr, 1, mask=tl.max(bad, axis=0) > 0)
    tl.store(words_ptr + n * y_n + h * y_h + w * y_w, word, mask=mask)


@triton.jit(do_not_specialize=PLAIN)
def rescale_elements(
    x_ptr, y_ptr, x_zero, scale, inverse, y_zero, low, high,
    R, B, C, D, x_a, x_b, x_c, x_d, y_a, y_b, y_c, y_d, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Onto another grid, or off any where y is float (`inverse` is then 1)."""
    row, column, mask = rows_and_columns(R, D, BR, BD)
    x = tl.load(x_ptr + places_of(row, column, B, C, x_a, x_b, x_c, x_d), mask=mask, other=0).to(tl.int32)
    v = (x - x_zero).to(tl.float32) * scale * inverse
    write(y_ptr, places_of(row, column, B, C, y_a, y_b, y_c, y_d), v, y_zero, low, high, mask)


@triton.jit
def look_up_elements(
    x_ptr, y_ptr, table_ptr, R, B, C, D, x_a, x_b, x_c, x_d, y_a, y_b, y_c, y_d,
    TABLE: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Through a table of 256, or a plain copy."""
    row, column, mask = rows_and_columns(R, D, BR, BD)
    v = tl.load(x_ptr + places_of(row, column, B, C, x_a, x_b, x_c, x_d), mask=mask, other=0)
    if TABLE:
        v = tl.load(table_ptr + v.to(tl.int32) + 128)
    tl.store(y_ptr + places_of(row, column, B, C, y_a, y_b, y_c, y_d), v, mask=mask)


@triton.jit
def repeat_elements(
    x_ptr, y_ptr, R, B, C, D, x_a, x_b, x_c, x_d, y_a, y_b, y_c, y_d,
    DOWN: tl.constexpr, ACROSS: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Every line (of B) DOWN times, every pixel of it (of C) ACROSS times."""
    row, column, mask = rows_and_columns(R, D, BR, BD)
    line = row // C
    there = (line // B * x_a + line % B // DOWN * x_b + row % C // ACROSS * x_c)[:, None] + (column * x_d)[None, :]
    v = tl.load(x_ptr + there, mask=mask, other=0)
    tl.store(y_ptr + places_of(row, column, B, C, y_a, y_b, y_c, y_d), v, mask=mask)


@triton.jit(do_not_specialize=PLAIN)
def add_elements(
    left_ptr, right_ptr, y_ptr, left_zero, left_multiplier, right_zero, right_multiplier, y_zero, low, high,
    R, B, C, D, l_a, l_b, l_c, l_d, r_a, r_b, r_c, r_d, y_a, y_b, y_c, y_d, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    row, column, mask = rows_and_columns(R, D, BR, BD)
    left = tl.load(left_ptr + places_of(row, column, B, C, l_a, l_b, l_c, l_d), mask=mask, other=0).to(tl.int32)
    right = tl.load(right_ptr + places_of(row, column, B, C, r_a, r_b, r_c, r_d), mask=mask, other=0).to(tl.int32)
    v = (left - left_zero).to(tl.float32) * left_multiplier + (right - right_zero).to(tl.float32) * right_multiplier
    write(y_ptr, places_of(row, column, B, C, y_a, y_b, y_c, y_d), v, y_zero, low, high, mask)


@triton.jit(do_not_specialize=PLAIN)
def multiply_elements(
    left_ptr, right_ptr, y_ptr, left_zero, right_zero, multiplier, y_zero, low, high,
    R, B, C, D, l_a, l_b, l_c, l_d, r_a, r_b, r_c, r_d, y_a, y_b, y_c, y_d, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    row, column, mask = rows_and_columns(R, D, BR, BD)
    left = tl.load(left_ptr + places_of(row, column, B, C, l_a, l_b, l_c, l_d), mask=mask, other=0).to(tl.int32)
    right = tl.load(right_ptr + places_of(row, column, B, C, r_a, r_b, r_c, r_d), mask=mask, other=0).to(tl.int32)
    v = ((left - left_zero) * (right - right_zero)).to(tl.float32) * multiplier
    write(y_ptr, places_of(row, column, B, C, y_a, y_b, y_c, y_d), v, y_zero, low, high, mask)
