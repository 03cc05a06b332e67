"""Weights on levels that need not be equally spaced: indices, a table, and scales."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor, nn

from qsweep.hub.convert import convert
from qsweep.hub.export import quantizable_graph
from qsweep.hub.form import QuantizedModel
from qsweep.hub.insert import insert_observers
from qsweep.hub.weights import Codebook
from qsweep.quantize._arithmetic import weight_levels
from qsweep.quantize._kmeans import errors, kmeans, nearest, starts
from qsweep.quantize._observers import embedding_observer
from qsweep.quantize.codebook import Granularity
from qsweep.quantize.table import Table
from qsweep.stage import Context

Fit = Callable[[Tensor, int], Codebook]
"""Weights (C, ...), finite, float32, and bits to what is stored of them."""


class TableWeight(nn.Module):
    """Stands on the weights of a layer until they are stored; see `qsweep.hub.insert.WeightObserver`."""

    def __init__(self, fit: Fit, bits: int) -> None:
        super().__init__()
        self.fit, self.bits = fit, bits

    def forward(self, weight: Tensor) -> Tensor:
        return weight

    def stored(self, weight: Tensor, smallest_scale: Tensor) -> Codebook:
        return self.fit(weight, self.bits)


def weights_only(config: Table, model: nn.Module, context: Context, fit: Fit) -> QuantizedModel:
    """The hub form of `model` with the weights of every layer stored as `fit` says, all else in floating point."""
    found = quantizable_graph(model, context)
    config.check_layers(found.layers(), found.recurrent_weights)
    insert_observers(
        found,
        lambda place: None,
        lambda place: TableWeight(fit, config.bits_of(edge=place.edge)),
        lambda: embedding_observer(config),
        real=config.stays_float,
    )
    return convert(found)


@torch.no_grad()
def codebook(weight: Tensor, bits: int, granularity: Granularity) -> Codebook:
    """`weight` (C, ...) on k-means centres, with a squared error that is never above that of uniform levels.

    Centres are in units of the uniform levels' scales, in float16, which holds those levels exactly. Where channels
    share a table each counts alike, whatever its scale: weighted by squared scales, ResNet-20 has the same accuracy at
    4 bits and loses 3.7 points more at 3. Rows of values that contain zeros have a centre at 0.
    """
    scale = weight_levels(weight, bits, per_tensor=granularity == "tensor").scale.double()
    values = weight.double().flatten(1) / scale
    importance = scale.square().expand_as(values)
    if granularity != "channel":
        values, importance = values.reshape(1, -1), importance.reshape(1, -1)
    levels = torch.arange(-(1 << (bits - 1)), 1 << (bits - 1))
    found = kmeans(values, starts(values, levels), (values == 0).any(1))
    found = torch.cat([levels.double().expand_as(found[:, :1]), found.half().double()], 1)
    squared = errors(values, found, importance)
    worse = squared > squared[:, :1]  # than uniform
    best = errors(values, found, torch.ones_like(values)).masked_fill(worse, torch.inf).argmin(1)
    return _stored(
        weight, values, found[torch.arange(len(found)), best], scale[:1] if granularity == "tensor" else scale
    )


@torch.no_grad()
def apot(weight: Tensor, bits: int) -> Codebook:
    """`weight` (C, ...) on `apot_levels`, with the scale of each channel that gives the least squared error."""
    levels = apot_levels(bits).double()[None]
    rows = weight.double().flatten(1)
    widest = weight_levels(weight, 2).scale.double() / levels.max()  # the largest weight on the last level
    best, error = widest, torch.full_like(widest, torch.inf)
    for step in range(40):
        scale = widest * (1 - step / 45)
        for _ in range(3):  # from each share of the range: the scale that is best for the levels taken
            taken = levels.expand(len(rows), -1).gather(1, nearest(rows / scale, levels.expand(len(rows), -1)))
            found = (rows - taken * scale).square().sum(1, keepdim=True)
            best, error = torch.where(found < error, scale, best), torch.minimum(found, error)
            scale = _projected(rows, taken, scale)
    return _stored(weight, (rows / best.float()).reshape(1, -1), levels, best)


def _projected(rows: Tensor, taken: Tensor, scale: Tensor) -> Tensor:
    """The scale that brings `taken` (C, n) closest to `rows`; `scale` (C, 1) where they are all 0."""
    power = taken.square().sum(1, keepdim=True)
    found = (rows * taken).sum(1, keepdim=True) / power.clamp(min=1e-12)
    return torch.where((power > 0) & (found > 0), found, scale)


def apot_levels(bits: int) -> Tensor:
    """(2^bits,) ascending sums of powers of two and their negatives, 0 twice, float32; the largest power is 1.

    `bits` - 1 = 2n or 2n + 1 bits for the magnitude: n terms p_i of {0, 2^-i, 2^-(i+n), 2^-(i+2n)} (eq. 5 with k = 2),
    or with a last exponent of i+2n+1 and one more term of {0, 2^-2n} (eq. 6).
    """
    count, odd = divmod(bits - 1, 2)
    terms = [(0.0, *(2.0**-exponent for exponent in (i, i + count, i + 2 * count + odd))) for i in range(count)]
    sums = torch.tensor([sum(term) for term in product(*terms, *[(0.0, 4.0**-count)] * odd)])
    return torch.cat([-sums, sums]).sort().values + 0.0  # no -0.0


def _stored(weight: Tensor, values: Tensor, table: Tensor, scale: Tensor) -> Codebook:
    bits = table.shape[1].bit_length() - 1
    places = nearest(values, table).reshape(weight.shape) - (1 << (bits - 1))
    return Codebook(places.to(torch.int8), table.half(), scale[:, 0].float().contiguous(), bits)
