"""Modules that stand on a graph's values: observers while calibrating, fake quantizers while training."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from qsweep.hub.form import DynamicGrid, Grid, RowGrid
from qsweep.hub.insert import Place
from qsweep.hub.weights import Channels, Groups, Stored
from qsweep.quantize._arithmetic import WeightLevels, activation_grid, weight_levels
from qsweep.quantize._ranges import BINS, Histogram, fitted_range
from qsweep.quantize.base import Grids, LowBit, Uniform
from qsweep.quantize.ptq import PTQ

_PART = 1 << 22
"""Values counted at once: counting takes six times their memory."""


class RangeObserver(nn.Module):
    """Keeps of the values that pass what the range is fitted to: extremes in a first pass, counts in a second one.

    moving_average: of the batches' extremes, each weighing a tenth less than the next (Jacob et al. 2018, section 3.1),
    without their bias towards the start (Kingma and Ba 2015, section 3). The others: see `_ranges`.
    """

    low: Tensor
    high: Tensor
    average: Tensor
    """(2,) of the batches' smallest and largest values."""
    counts: Tensor | None = None
    """(2 * BINS + 1,) int64 while or after values are counted: bins, then zeros."""
    batches = 0
    fitted = False
    """Whether the range is settled: what passes no longer changes it."""
    _momentum = 0.1

    def __init__(self, config: Grids, place: Place) -> None:
        super().__init__()
        self.calibration, self.scheme = config.calibration, config.activation_scheme
        self.nonnegative = place.nonnegative
        self.bits, self.readers = activation_bits(config, place), place.layers
        self.register_buffer("low", torch.tensor(0.0))
        self.register_buffer("high", torch.tensor(0.0))
        self.register_buffer("average", torch.zeros(2), persistent=False)

    @property
    def counts_values(self) -> bool:
        """Whether the range needs the second pass."""
        return self.calibration not in ("minmax", "moving_average")

    def forward(self, values: Tensor) -> Tensor:
        if values.numel() and not self.fitted:
            if self.counts is None:
                self._extend(values.detach())
            else:
                self._count(values.detach(), self.counts)
        return values

    def _extend(self, values: Tensor) -> None:
        low, high = (end.float() for end in values.aminmax())
        self.low.copy_(torch.minimum(self.low, low))  # keeps NaN, for who reads the range
        self.high.copy_(torch.maximum(self.high, high))
        self.batches += 1
        weight = self._momentum / (1 - (1 - self._momentum) ** self.batches)
        self.average.lerp_(torch.stack([low.clamp(max=0.0), high.clamp(min=0.0)]), weight)

    def _count(self, values: Tensor, counts: Tensor) -> None:
        width = torch.maximum(-self.low, self.high).double() / BINS
        for part in torch.split(values.flatten(), _PART):
            found = part[part != 0].double()
            places = (found / width).floor().clamp(-BINS, BINS - 1).long() + BINS
            counts[:-1] += torch.bincount(places, minlength=2 * BINS)
            counts[-1] += part.numel() - found.numel()

    @property
    def statistics(self) -> Tensor:
        """What was seen in this pass, of one shape for all observers: to be kept, and put back into another one."""
        return torch.stack([self.low, self.high, *self.average]) if self.counts is None else self.counts

    @statistics.setter
    def statistics(self, values: Tensor) -> None:
        if values.is_floating_point():
            self._settle(values[0].item(), values[1].item())
            self.average.copy_(values[2:])
        else:
            self.counts = values

    def begin_counting(self) -> None:
        """From now on count the values, in bins between the extremes seen so far."""
        self.counts = torch.zeros(2 * BINS + 1, dtype=torch.int64, device=self.low.device)

    def fit(self) -> None:
        """Settle the range from what was seen."""
        if self.calibration == "moving_average":
            self._settle(self.average[0].item(), self.average[1].item())
        elif self.counts_values:
            how = (self.calibration, self._seen(), self.bits, self.scheme)
            self._settle(*fitted_range(*how, nonnegative=self.nonnegative))
        self.counts, self.fitted = None, True

    def _settle(self, low: float, high: float) -> None:
        self.low.fill_(low)
        self.high.fill_(high)

    def _seen(self) -> Histogram:
        assert self.counts is not None
        *counts, zeros = self.counts.tolist()
        return Histogram(np.array(counts, np.float64), zeros, self.low.item(), self.high.item())

    def grid(self) -> Grid:
        low, high = self.low.item(), self.high.item()
        return activation_grid(low, high, self.bits, self.scheme, nonnegative=self.nonnegative)


class BatchObserver(nn.Module):
    """Stands where each batch is to set its own grid: there is nothing to observe."""

    def __init__(self, config: Grids, place: Place) -> None:
        super().__init__()
        self.symmetric = config.activation_scheme == "symmetric" and not place.nonnegative
        self.bits = activation_bits(config, place)

    def forward(self, values: Tensor) -> Tensor:
        return values

    def grid(self) -> DynamicGrid:
        return DynamicGrid(-(1 << (self.bits - 1)), (1 << (self.bits - 1)) - 1, self.symmetric)


class RowObserver(nn.Module):
    """Stands where each row is to set its own grid."""

    def __init__(self, config: Grids, place: Place) -> None:
        super().__init__()
        self.bits = activation_bits(config, place)

    def forward(self, values: Tensor) -> Tensor:
        return values

    def grid(self) -> RowGrid:
        return RowGrid.of(self.bits)


def activation_bits(config: Grids, place: Place) -> int:
    """The bits of the activations at `place`; not for configs that leave them in floating point.

    What no layer reads has 8: fewer save no arithmetic, and cost a ResNet-20 1.7 pp at 4 bits.
    """
    assert config.activation_bits is not None
    if not place.layers:
        return max(8, config.activation_bits)
    return config.edge_bits if place.edge and config.edge_bits else config.activation_bits


def apart(config: Grids, place: Place) -> bool:
    """Whether others than layers have a grid of their own at `place`, where layers read too: see `Grids.sum_grid`."""
    return config.activation_bits is not None and config.sum_grid == "own" and activation_bits(config, place) < 8


def activation_observer(config: Grids, place: Place) -> RangeObserver | BatchObserver | RowObserver | None:
    """What stands on the activations at `place`; None leaves them as they are."""
    if config.activation_bits is None:
        return None
    if config.activation_mode == "token":
        return RowObserver(config, place) if place.rows else None
    return BatchObserver(config, place) if config.activation_mode == "dynamic" else RangeObserver(config, place)


class NearestWeight(nn.Module):
    """Lets weights pass; says, when a graph is converted, what the nearest of their levels are."""

    levels: WeightLevels | None = None
    """Set by what has fitted the weights to levels already; None: fitted when they are needed."""

    def __init__(self, config: Uniform, place: Place) -> None:
        super().__init__()
        self.config = config
        self.bits = config.bits_of(next(iter(place.layers), ""), edge=place.edge)

    def fitted(self, weight: Tensor, smallest_scale: Tensor | None = None) -> WeightLevels:
        """The levels of `weight` (C, ...)."""
        if self.levels is not None:
            if smallest_scale is None:
                return self.levels
            return replace(self.levels, scale=torch.maximum(self.levels.scale, smallest_scale.unsqueeze(1)))
        config = self.config
        return weight_levels(
            weight,
            self.bits,
            scheme=config.weight_scheme,
            per_tensor=config.weight_granularity == "tensor",
            group_size=config.group_size,
            mse=config.weight_range == "mse",
            smallest=smallest_scale,
        )

    def forward(self, weight: Tensor) -> Tensor:
        return weight

    def stored(self, weight: Tensor, smallest_scale: Tensor) -> Stored:
        """See `qsweep.hub.insert.WeightObserver`."""
        levels = self.fitted(weight, smallest_scale)
        integers = levels.integers(weight).to(torch.int8 if self.bits <= 8 else torch.int16)
        if levels.symmetric_channels:
            return Channels(integers, levels.scale[:, 0].contiguous(), levels.low, levels.high)
        return Groups(integers, levels.scale, levels.zero_point, levels.low, levels.high)


def embedding_observer(config: LowBit, made: type[NearestWeight] = NearestWeight) -> NearestWeight | None:
    """What stands on the tables of embeddings, while calibrating or, `made` a fake quantizer, while training; None
    leaves them as they are."""
    bits = config.embedding_bits
    return None if bits is None else made(PTQ(weight_bits=bits), Place((), edge=False))
