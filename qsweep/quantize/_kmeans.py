"""K-means in one dimension, for many rows at once. All tensors are float64."""

from __future__ import annotations

import torch
from torch import Tensor

_STEPS = 500
"""Most Lloyd steps. Rows of some thousand weights are stable after a few dozen at 4 bits, a few hundred at 8."""


def kmeans(values: Tensor, starts: Tensor, zero: Tensor) -> Tensor:
    """Centres (R, S, k), ascending, that Lloyd's algorithm reaches on `values` (R, n) from each of `starts` (R, S, k).

    No step raises the squared error; an empty cluster keeps its centre. In rows where `zero` (R,) is true the centre
    nearest to 0 is, and stays, exactly 0. Deterministic.
    Source: Lloyd, "Least Squares Quantization in PCM" (1982), method I.
    """
    values = values.sort(dim=1).values
    sums = torch.nn.functional.pad(values.cumsum(1), (1, 0))
    centres = starts.sort(dim=2).values
    pinned = _nearest_to_zero(centres) & zero[:, None, None]
    centres = centres.masked_fill(pinned, 0.0)
    for _ in range(_STEPS):
        moved = _means(values, sums, centres).masked_fill(pinned, 0.0)
        if torch.equal(moved, centres):
            break
        centres = moved
    return centres


def starts(values: Tensor, levels: Tensor) -> Tensor:
    """(R, 4, k) centres to begin with: `levels` (k,), quantiles of `values` (R, n), equal steps, and between the two.

    Quantiles starve the tails, equal steps the middle; which of them ends lower differs from layer to layer.
    """
    ranked, share = values.sort(dim=1).values, (torch.arange(len(levels), dtype=torch.float64) + 0.5) / len(levels)
    quantiles = ranked[:, (share * ranked.shape[1]).long()]
    steps = ranked[:, :1].lerp(ranked[:, -1:], share)
    return torch.stack([levels.double().expand_as(quantiles), quantiles, steps, (quantiles + steps) / 2], 1)


def nearest(values: Tensor, centres: Tensor) -> Tensor:
    """Index, int64, of the centre nearest to each of `values` (R, n) among ascending `centres` (R, k)."""
    return torch.searchsorted(_midpoints(centres), values.contiguous())


def errors(values: Tensor, centres: Tensor, importance: Tensor) -> Tensor:
    """(R, S) squared errors of `values` (R, n), each at the nearest of ascending `centres` (R, S, k), weighted."""
    found = [values - row.gather(1, nearest(values, row)) for row in centres.unbind(1)]
    return torch.stack([(importance * error.square()).sum(1) for error in found], 1)


def _nearest_to_zero(centres: Tensor) -> Tensor:
    return torch.arange(centres.shape[2]) == centres.abs().argmin(2, keepdim=True)


def _means(ranked: Tensor, sums: Tensor, centres: Tensor) -> Tensor:
    """The mean of the values nearest to each centre: clusters of ascending values are runs between two midpoints.

    `sums` (R, n + 1): of the first 0 to n values of each row.
    """
    ends = torch.searchsorted(ranked, _midpoints(centres).flatten(1)).reshape(*centres.shape[:2], -1)
    first = torch.zeros_like(ends[..., :1])
    ends = torch.cat([first, ends, first + ranked.shape[1]], 2)
    total, count = sums.gather(1, ends.flatten(1)).reshape(ends.shape).diff(dim=2), ends.diff(dim=2)
    return torch.where(count > 0, total / count, centres)


def _midpoints(centres: Tensor) -> Tensor:
    return ((centres[..., 1:] + centres[..., :-1]) / 2).contiguous()
