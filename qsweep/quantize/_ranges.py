"""Where an activation's range ends, from a histogram of what calibration saw: arithmetic alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qsweep.hub.form import Grid
from qsweep.quantize._arithmetic import activation_grid
from qsweep.quantize.base import Calibration, Scheme

BINS = 2048
"""On each side of zero."""
_SHARE = 0.9999
"""Of the values, that a percentile's range holds."""
_MOST_CLIPPED = 0.01
_CANDIDATES = 64
_FINEST_BITS = 8
"""Levels of more bits are finer than the bins: what rounding costs cannot be read from these."""

Ends = tuple[float, float]
F64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Histogram:
    """Values of one tensor, counted in bins of equal width that meet at zero.

    Bin i of `counts` (2 * BINS,) holds values from (i - BINS) * width. Zeros are counted apart: they lie on every grid
    and, after a rectifier, would outweigh all the rest.
    """

    counts: F64
    zeros: int
    low: float
    """The smallest value, or 0."""
    high: float
    """The largest value, or 0."""

    @property
    def width(self) -> float:
        return max(-self.low, self.high) / BINS

    def filled(self) -> tuple[F64, F64]:
        """Centres and counts of the bins that are not empty."""
        (places,) = self.counts.nonzero()
        return (places.astype(np.float64) - BINS + 0.5) * self.width, self.counts[places]


def fitted_range(calibration: Calibration, seen: Histogram, bits: int, scheme: Scheme, *, nonnegative: bool) -> Ends:
    """The range by `percentile`, `mse` or `entropy`; it lies within [low, high] of `seen` and holds zero."""
    if calibration == "percentile":
        return percentile_range(seen, scheme)
    if bits > _FINEST_BITS or not seen.counts.any():
        return seen.low, seen.high
    cost = squared_error if calibration == "mse" else divergence

    def grid(ends: Ends) -> Grid:
        return activation_grid(*ends, bits, scheme, nonnegative=nonnegative)

    return _least(seen, scheme, lambda ends: cost(seen, grid(ends)))


def percentile_range(seen: Histogram, scheme: Scheme, share: float = _SHARE) -> Ends:
    """The range, in whole bins, that holds `share` of the values, zeros included.

    Symmetric: of |x|. Asymmetric: as many values are left out below as above, where there are values on both sides.
    """
    left, right = seen.counts[BINS - 1 :: -1], seen.counts[BINS:]
    beyond = (1 - share) * (seen.counts.sum() + seen.zeros)
    if scheme == "symmetric":
        reach = _reach(left + right, beyond) * seen.width
        return max(seen.low, -reach), min(seen.high, reach)
    beyond = beyond / 2 if left.any() and right.any() else beyond
    low, high = (_reach(side, beyond) * seen.width for side in (left, right))
    return max(seen.low, -low), min(seen.high, high)


def _reach(side: F64, beyond: float) -> int:
    """The smallest number of bins from zero, at least 1, past which no more than `beyond` values lie."""
    past = side.sum() - side.cumsum()
    return int((past <= beyond).argmax()) + 1


def squared_error(seen: Histogram, grid: Grid) -> float:
    """Sum of the squared errors of rounding and clipping to `grid` (Nagel et al. 2021, section 3.1)."""
    centres, counts = seen.filled()
    levels = np.clip(np.rint(centres / grid.scale) + grid.zero_point, grid.low, grid.high)
    errors = (levels - grid.zero_point) * grid.scale - centres
    return float((counts * errors * errors).sum())


def divergence(seen: Histogram, grid: Grid) -> float:
    """Kullback-Leibler divergence of the values from what `grid` leaves of them (Migacz 2017).

    P: the bins within the grid, what is clipped added to the outermost ones. Q: the same bins without what is clipped,
    each level's sum spread evenly over its bins that are not empty. Infinite for a grid finer than the bins, of which
    nothing can be told, and for one that clips a hundredth of the values and has more levels than filled bins: as
    these lose nothing, all values clipped into one bin would be best.
    """
    if grid.scale < seen.width:
        return float("inf")
    centres, counts = seen.filled()
    places = centres / grid.scale + grid.zero_point
    inside = (places >= grid.low - 0.5) & (places <= grid.high + 0.5)
    if inside.sum() <= grid.high - grid.low and counts[~inside].sum() > _MOST_CLIPPED * counts.sum():
        return float("inf")
    first, last = inside.argmax(), len(inside) - inside[::-1].argmax()
    p, q = counts[first:last].copy(), counts[first:last]
    p[0] += counts[:first].sum()
    p[-1] += counts[last:].sum()
    levels = np.clip(np.rint(places[first:last]), grid.low, grid.high).astype(np.int64) - grid.low
    q = (np.bincount(levels, q) / np.maximum(np.bincount(levels), 1))[levels]
    return float((p / p.sum() * np.log((p / p.sum()) / (q / q.sum()))).sum())


def _least(seen: Histogram, scheme: Scheme, cost: Callable[[Ends], float]) -> Ends:
    """Of shares of [low, high], the one of least cost: both ends together, then, if they are free, in turn."""
    free = scheme == "asymmetric" and seen.low < 0 < seen.high
    best, least = (1.0, 1.0), cost((seen.low, seen.high))
    for turn in range(5 if free else 1):
        for shares in list(_candidates(best, turn)):
            found = cost(_ends(seen, scheme, shares))
            if found < least:
                best, least = shares, found
    return _ends(seen, scheme, best)


def _candidates(best: Ends, turn: int) -> Iterator[Ends]:
    for step in range(1, _CANDIDATES):
        share = step / _CANDIDATES
        yield (share, share) if turn == 0 else (best[0], share) if turn % 2 else (share, best[1])


def _ends(seen: Histogram, scheme: Scheme, shares: Ends) -> Ends:
    if scheme == "symmetric":
        reach = shares[1] * max(-seen.low, seen.high)
        return max(seen.low, -reach), min(seen.high, reach)
    return seen.low * shares[0], seen.high * shares[1]
