"""Grids on which every runtime rounds alike.

A sum or product of two 8-bit tensors, a mean or function of one, or one on a coarser grid is rounded from a handful of
float32 operations, and runtimes differ in their order, in whether they fuse multiply and add, and in the last bits of a
function. On a value close to half way between two levels that decides the result: one pair of inputs in 65,536 was seen
to differ between the contract and ONNX Runtime, and one flip spreads over the rest of the network. The inputs are few
enough to look at all of them, so the output's scale is moved, by some millionths, to where all orders agree on every
input.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

_TRIES = 200
_MOST_ELEMENTS = 1024
_NUDGE = 1 + 2.0**-17
_CLOSE = 2e-3
"""Only inputs this close to a tie are looked at; the rounding of float32 below 512 moves a value by a tenth of it."""

_CLEAR, _CLEAR_SHARE = 1e-4, 2e-6
"""How far from ties what a function gives is kept, in levels and of its own level: ten times what float32 makes of an
`erf`, or of one close to -1."""

_FARTHEST = 512
"""Levels from zero: what lies beyond is at the end of every grid."""

_THREE = range(16, 256)
"""Steps to 3 of grids that are moved to a whole number of them: scales stay within a 16th, and 8 bits may reach -3."""

_ROUNDING = 2.0**-20
"""More than float32 is off a quotient."""

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]


def settle_sum(
    left: tuple[float, int, int, int], right: tuple[float, int, int, int], scale: float, zero_point: int
) -> float:
    """A scale close to `scale` for left + right, each (scale, zero_point, low, high), on which all orders agree."""
    levels = np.meshgrid(np.arange(left[2], left[3] + 1), np.arange(right[2], right[3] + 1))
    a, b = (level.ravel() - zero for level, zero in zip(levels, (left[1], right[1]), strict=True))

    def agree(candidate: np.float32) -> bool:
        ra, rb = (np.float32(side[0]) / candidate for side in (left, right))
        exact = a * np.float64(ra) + b * np.float64(rb)
        near = _near_tie(exact)
        return _all_equal(_sums(a[near], b[near], left, right, candidate, zero_point))

    return _settle(scale, agree)


def settle_product(
    left: tuple[float, int, int, int], right: tuple[float, int, int, int], scale: float, zero_point: int
) -> float:
    """A scale close to `scale` for left * right, each (scale, zero_point, low, high), on which all orders agree."""
    a, b = (np.arange(side[2], side[3] + 1) - side[1] for side in (left, right))
    products = np.unique(np.multiply.outer(a, b))
    step = np.float32(left[0]) * np.float32(right[0])

    def agree(candidate: np.float32) -> bool:
        exact = products * (np.float64(left[0]) * np.float64(right[0]) / np.float64(candidate))
        near = products[_near_tie(exact) & (np.abs(exact) < _FARTHEST)].astype(np.float32)
        levels = [np.rint(near * way) for way in (step / candidate, step * (np.float32(1) / candidate))]
        levels += [np.rint(near * step / candidate), np.rint(near * step * (np.float32(1) / candidate))]
        # the output's zero point added before rounding (MLAS, for signed and for unsigned storage)
        for zero in (np.float32(zero_point), np.float32(zero_point + 128)):
            levels.append(np.rint(near * (step / candidate) + zero) - zero)
        return _all_equal(levels)

    return _settle(scale, agree)


def whole_thirds(scale: float) -> float:
    """The next scale from `scale` up of which 3 is a whole multiple, a 16th away at most; `scale` if that is of no use.

    On such a grid x * clip(x + 3, 0, 6) / 6 is a product of integers.
    """
    steps = int(3 / scale * (1 + _ROUNDING))
    return float(np.float32(3) / np.float32(steps)) if steps in _THREE else scale


def steps_of_three(scale: float) -> int | None:
    """How many steps of `scale` 3 is, if `whole_thirds` has made it a whole number."""
    steps = round(3 / scale)
    return steps if steps in _THREE and np.float32(3) / np.float32(steps) == np.float32(scale) else None


def settle_values(values: F32, scale: float) -> float:
    """A scale close to `scale` on which none of `values`, all that a function gives, is close to a tie: runtimes differ
    in the last bits of a function."""

    def agree(candidate: np.float32) -> bool:
        exact = values / np.float64(candidate)
        near = _near_tie(exact, _CLEAR + _CLEAR_SHARE * np.abs(exact))
        return not (near & (np.abs(exact) < _FARTHEST)).any()

    return _settle(scale, agree)


def settle_mean(scale_in: float, low: int, high: int, count: int, scale: float) -> float:
    """A scale close to `scale` for the mean of `count` centred integers from `low` to `high`.

    Over more than 1024 elements sums lie too close: the scale is left as it is, and runtimes agree within one level.
    """
    if count > _MOST_ELEMENTS:
        return scale
    sums = np.arange(low * count, high * count + 1)

    def agree(candidate: np.float32) -> bool:
        step = np.float32(scale_in)
        multipliers = [step / (candidate * np.float32(count)), (step / np.float32(count)) / candidate]
        near = sums[_near_tie(sums * np.float64(multipliers[0]))].astype(np.float32)
        results = [near * multiplier for multiplier in multipliers]
        results += [(near * step) / np.float32(count) / candidate, (near * step / np.float32(count)) * (1 / candidate)]
        return _all_equal([np.rint(result) for result in results])

    return _settle(scale, agree)


def settle_again(given: tuple[float, int, int, int], scale: float) -> float:
    """A scale close to `scale` on which integers of the grid `given` (scale, zero_point, low, high) round alike."""
    step, centred = np.float32(given[0]), np.arange(given[2], given[3] + 1) - given[1]
    levels = centred.astype(np.float32)

    def agree(candidate: np.float32) -> bool:
        near = levels[_near_tie(centred * (np.float64(step) / np.float64(candidate)))]
        ways = [near * step / candidate, near * step * (np.float32(1) / candidate), near * (step / candidate)]
        exact = near.astype(np.float64) * np.float64(step) / np.float64(candidate)
        return _all_equal([np.rint(way) for way in [*ways, exact]])

    return _settle(scale, agree)


def _settle(scale: float, agree: Callable[[np.float32], bool]) -> float:
    candidate = np.float32(scale)
    for _ in range(_TRIES):
        if agree(candidate):
            return float(candidate)
        candidate = np.float32(candidate * np.float32(_NUDGE))
    return scale


def _near_tie(exact: F64, close: float | F64 = _CLOSE) -> npt.NDArray[np.bool_]:
    return np.abs(exact - np.floor(exact) - 0.5) < close


def _sums(
    a: npt.NDArray[np.int64],
    b: npt.NDArray[np.int64],
    left: tuple[float, int, int, int],
    right: tuple[float, int, int, int],
    scale: np.float32,
    zero_point: int,
) -> list[F32 | F64]:
    """Levels less the zero point, by every order of operations that runtimes are known to use."""
    x, y = a.astype(np.float32), b.astype(np.float32)
    ra, rb = (np.float32(side[0]) / scale for side in (left, right))
    # the contract, and the same with either multiplication fused into the addition
    ways: list[F32 | F64] = [x * ra + y * rb, _fused(x, ra, y * rb), _fused(y, rb, x * ra)]
    # dequantize, add, quantize in float
    real = x * np.float32(left[0]) + y * np.float32(right[0])
    ways += [real / scale, real * (np.float32(1) / scale)]
    levels = [np.rint(way) for way in ways]
    # zero points gathered into one constant, and the output's added before rounding, where an odd one turns the even
    # side of a tie around (MLAS, for signed and for unsigned storage)
    for offset in (0, 128):
        za, zb, zc = (np.float32(z + offset) for z in (left[1], right[1], zero_point))
        xs, ys = x + za, y + zb
        for fixed in (zc - (ra * za + rb * zb), np.float32(_fused(-za, ra, _fused(-zb, rb, zc)))):
            ways = [xs * ra + fixed + ys * rb, _fused(ys, rb, _fused(xs, ra, fixed)), xs * ra + ys * rb + fixed]
            ways += [ys * rb + fixed + xs * ra, _fused(xs, ra, _fused(ys, rb, fixed))]
            levels += [np.rint(way) - zc for way in ways]
    return levels


def _fused(x: F32 | np.float32, ratio: np.float32, addend: F32 | np.float32) -> F32:
    wide = np.asarray(x, np.float64) * np.float64(ratio) + np.asarray(addend, np.float64)
    return np.asarray(wide, np.float32)


def _all_equal(levels: list[F32 | F64]) -> bool:
    return all(np.array_equal(levels[0], other) for other in levels[1:])
