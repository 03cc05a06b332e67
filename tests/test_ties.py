from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qsweep.hub.ties import (
    settle_again,
    settle_mean,
    settle_product,
    settle_sum,
    settle_values,
    steps_of_three,
    whole_thirds,
)

Operand = tuple[float, int, int, int]
F32 = np.float32


def orders(left: Operand, right: Operand, scale: float, zero_point: int) -> list[np.ndarray]:
    """Levels of all pairs of inputs, by the contract and by the ways runtimes were seen to compute; each as text would
    have it, in float32, fused operations in float64 and rounded once."""
    a, b = np.meshgrid(np.arange(left[2], left[3] + 1), np.arange(right[2], right[3] + 1))
    x, y = (a.ravel() - left[1]).astype(F32), (b.ravel() - right[1]).astype(F32)
    ra, rb = F32(left[0]) / F32(scale), F32(right[0]) / F32(scale)

    def fma(u: np.ndarray, v: np.float32, w: np.ndarray | np.float32) -> np.ndarray:
        return (u.astype(np.float64) * np.float64(v) + w).astype(F32)

    unsigned = (a.ravel() + 128).astype(F32), (b.ravel() + 128).astype(F32)
    fixed = F32(zero_point + 128) - (ra * F32(left[1] + 128) + rb * F32(right[1] + 128))
    shifted = fma(unsigned[1], rb, fma(unsigned[0], ra, fixed))
    real = x * F32(left[0]) + y * F32(right[0])
    ways = [x * ra + y * rb, fma(x, ra, y * rb), fma(y, rb, x * ra), real / F32(scale)]
    return [*(np.rint(way) for way in ways), np.rint(shifted) - F32(zero_point + 128)]


def agree(left: Operand, right: Operand, scale: float, zero_point: int) -> bool:
    first, *others = orders(left, right, scale, zero_point)
    assert len(first) == (left[3] - left[2] + 1) * (right[3] - right[2] + 1)
    return all(np.array_equal(first, other) for other in others)


def operand(scale: float, zero_point: int) -> Operand:
    return float(F32(scale)), zero_point, -128, 127


def test_there_is_a_sum_whose_rounding_depends_on_the_order_until_it_is_settled() -> None:
    left, right, scale = operand(0.02583393, 26), operand(0.02738902, -128), float(F32(0.02579484))
    assert not agree(left, right, scale, -128)
    assert agree(left, right, settle_sum(left, right, scale, -128), -128)


scales = st.floats(2**-10, 1.0, width=32)
points = st.integers(-128, 127)


@settings(max_examples=25, deadline=None)
@example(a=0.8583758473396301, b=2.0**-10, ratio=1.9833062808814605, za=0, zb=-1, zero_point=1)
@given(a=scales, b=scales, ratio=st.floats(0.5, 2.0), za=points, zb=points, zero_point=points)
def test_all_orders_agree_on_all_pairs_once_a_sum_is_settled(
    a: float, b: float, ratio: float, za: int, zb: int, zero_point: int
) -> None:
    left, right = operand(a, za), operand(b, zb)
    scale = float(F32((a + b) * ratio / 2))
    settled = settle_sum(left, right, scale, zero_point)
    assert agree(left, right, settled, zero_point)
    assert scale <= settled < 1.002 * scale


@settings(max_examples=25, deadline=None)
@example(a=0.1, b=1 / 255, ratio=127.0, za=0, zb=-128, zero_point=1)
@given(a=scales, b=scales, ratio=st.floats(20.0, 260.0), za=points, zb=points, zero_point=points)
def test_all_orders_agree_on_all_pairs_once_a_product_is_settled(
    a: float, b: float, ratio: float, za: int, zb: int, zero_point: int
) -> None:
    left, right = operand(a, za), operand(b, zb)
    scale = float(F32(a * b * ratio))
    settled = settle_product(left, right, scale, zero_point)
    x, y = np.meshgrid(np.arange(-128, 128) - za, np.arange(-128, 128) - zb)
    exact, step, out = (x * y).astype(F32), F32(left[0]) * F32(right[0]), F32(settled)
    real = (x.astype(F32) * F32(left[0])) * (y.astype(F32) * F32(right[0]))
    moved = F32(zero_point + 128)
    ways = [np.rint(exact * (step / out)), np.rint(exact * step / out), np.rint(exact * (step / out) + moved) - moved]
    *levels, apart = (np.clip(way, -128 - zero_point, 127 - zero_point) for way in (*ways, np.rint(real / out)))
    assert all(np.array_equal(levels[0], level) for level in levels)
    assert (levels[0] != apart).mean() < 1e-3  # each side rounded by itself, as simulations do
    assert scale <= settled < 1.002 * scale


@settings(max_examples=25, deadline=None)
@given(step=scales, ratio=st.floats(0.3, 1.0), count=st.integers(1, 64), zero_point=points)
def test_all_orders_agree_on_all_means_once_they_are_settled(
    step: float, ratio: float, count: int, zero_point: int
) -> None:
    scale = float(F32(step * ratio))
    settled = settle_mean(step, -128 - zero_point, 127 - zero_point, count, scale)
    sums = np.arange((-128 - zero_point) * count, (127 - zero_point) * count + 1).astype(F32)
    s, n, out = F32(step), F32(count), F32(settled)
    ways = [np.rint(sums * (s / (out * n))), np.rint(sums * (s / n / out)), np.rint(sums * s / n / out)]
    assert all(np.array_equal(ways[0], way) for way in ways)
    assert scale <= settled < 1.002 * scale


@settings(max_examples=50, deadline=None)
@given(step=scales, ratio=st.floats(4.0, 64.0) | st.sampled_from([16.0, 17.0, 85.0]), zero_point=points)
def test_integers_that_are_rounded_again_agree_in_all_orders_once_they_are_settled(
    step: float, ratio: float, zero_point: int
) -> None:
    given_, scale = operand(step, zero_point), float(F32(F32(step) * F32(ratio)))
    out = F32(settle_again(given_, scale))
    centred = (np.arange(-128, 128) - zero_point).astype(F32)
    real = centred * F32(step)
    ways = [np.rint(real / out), np.rint(real * (F32(1) / out)), np.rint(centred * (F32(step) / out))]
    assert all(np.array_equal(ways[0], way) for way in ways)
    assert scale <= out < 1.002 * scale


def test_scales_that_are_powers_of_two_stay_where_the_zero_point_is_even() -> None:
    assert settle_sum(operand(0.25, 0), operand(0.5, -128), 0.5, 4) == 0.5
    assert settle_again(operand(0.25, -3), 4.0) == 4.0


def test_the_mean_of_a_large_image_keeps_its_scale() -> None:
    assert settle_mean(0.02, 0, 255, 112 * 112, 0.013) == 0.013


def hardswish(given: Operand) -> np.ndarray:
    x = ((np.arange(given[2], given[3] + 1) - given[1]).astype(F32) * F32(given[0])).astype(np.float64)
    return (x * np.clip(x + 3, 0, 6) / 6).astype(F32)


def hardswish_levels(given: Operand, scale: float, zero_point: int) -> list[np.ndarray]:
    """Of every integer: by a table of the function, and as the product of two integers."""
    centred, three = np.arange(given[2], given[3] + 1) - given[1], steps_of_three(given[0])
    assert three is not None
    gates = np.clip(centred + three, 0, 2 * three)
    products = (centred * gates).astype(F32) * (F32(given[0]) * (F32(given[0]) / F32(6)) / F32(scale))
    unsigned = products + F32(zero_point + 128)
    table = hardswish(given) * (F32(1) / F32(scale))
    return [np.rint(table), np.rint(products), np.rint(unsigned) - F32(zero_point + 128)]


def test_there_is_a_hardswish_whose_table_is_not_its_product_until_it_is_settled() -> None:
    given, scale = operand(3 / 16, -28), float(F32(3 / 7))
    table, *products = hardswish_levels(given, scale, -120)
    assert not all(np.array_equal(table, other) for other in products)
    table, *products = hardswish_levels(given, settle_values(hardswish(given), scale), -120)
    assert all(np.array_equal(table, other) for other in products)


@settings(max_examples=50, deadline=None)
@given(steps=st.integers(16, 255), ratio=st.floats(0.3, 1.1), zero=points, zero_point=points)
def test_a_hardswish_is_a_product_of_integers_once_it_is_settled(
    steps: int, ratio: float, zero: int, zero_point: int
) -> None:
    given = operand(3 / steps, zero)
    settled = settle_values(hardswish(given), given[0] * ratio)
    table, *products = hardswish_levels(given, settled, zero_point)
    assert abs(settled / (given[0] * ratio) - 1) < 2e-3
    assert all(np.array_equal(table, other) for other in products)


@settings(max_examples=50, deadline=None)
@given(scale=st.floats(2.0**-8, 1.0, width=32), ratio=st.floats(0.1, 1.2), zero=points)
@example(scale=0.015625, ratio=0.125, zero=-38)
def test_the_last_bits_of_a_function_decide_nothing_once_it_is_settled(scale: float, ratio: float, zero: int) -> None:
    x = torch.arange(-128 - zero, 128 - zero).float() * scale
    exact = [function(x.double()).float().numpy() for function in (F.gelu, F.silu, torch.tanh, F.mish)]
    real = [function(x).numpy() for function in (F.gelu, F.silu, torch.tanh, F.mish)]
    for one, other in zip(exact, real, strict=True):
        settled = settle_values(one, scale * ratio)
        assert abs(settled / (scale * ratio) - 1) < 2e-3
        inside = np.abs(one) < 500 * settled
        for off in (1 - 1e-6, 1 + 1e-6):
            levels = np.rint(one / F32(settled)), np.rint(other * F32(off) / F32(settled))
            assert np.array_equal(*(level[inside] for level in levels))


@given(scale=st.floats(2.0**-100, 2.0**100, width=32))
def test_three_is_a_whole_number_of_steps_where_8_bits_may_reach_it(scale: float) -> None:
    moved = whole_thirds(scale)
    steps = steps_of_three(moved)
    assert scale * (1 - 2.0**-20) <= moved <= scale * 17 / 16
    assert whole_thirds(moved) == moved
    assert (steps is not None and moved == F32(3) / F32(steps)) or moved == scale
    assert steps is not None or not 3 / 255 <= scale <= 3 / 16
