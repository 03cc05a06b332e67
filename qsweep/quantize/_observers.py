"""Modules that stand on a graph's values: observers while calibrating, fake quantizers while training."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qsweep.errors import NotFinite
from qsweep.hub.form import Grid
from qsweep.hub.insert import Place
from qsweep.hub.weights import Channels, Groups, Stored
from qsweep.quantize._arithmetic import WeightLevels, activation_grid, weight_levels
from qsweep.quantize.base import Uniform


class RangeObserver(nn.Module):
    """Keeps the smallest and largest value that passes (min-max calibration)."""

    low: Tensor
    high: Tensor

    def __init__(self, config: Uniform, place: Place) -> None:
        super().__init__()
        assert config.activation_bits is not None
        self.scheme, self.nonnegative = config.activation_scheme, place.nonnegative
        self.bits = config.edge_bits if place.edge and config.edge_bits else config.activation_bits
        self.register_buffer("low", torch.tensor(0.0))
        self.register_buffer("high", torch.tensor(0.0))

    def forward(self, values: Tensor) -> Tensor:
        seen = values.detach()
        if seen.numel():
            low, high = seen.aminmax()
            if not (low.isfinite() and high.isfinite()):
                raise NotFinite("an activation is NaN or infinite on the calibration samples")
            self.low.copy_(torch.minimum(self.low, low))
            self.high.copy_(torch.maximum(self.high, high))
        return values

    def grid(self) -> Grid:
        low, high = self.low.item(), self.high.item()
        return activation_grid(low, high, self.bits, self.scheme, nonnegative=self.nonnegative)


class RangeFakeQuantize(RangeObserver):
    """Observes until it is enabled; then rounds to the grid, whose range, while training, follows the batches.

    The gradient is 1 inside the grid and 0 beyond its ends (Bengio et al. 2013); the ends are moving averages (Jacob et
    al. 2018, section 3.1).
    """

    momentum = 0.01
    enabled = False

    def forward(self, values: Tensor) -> Tensor:
        if not self.enabled:
            return super().forward(values)
        if self.training:
            low, high = values.detach().aminmax()
            self.low.lerp_(low.clamp(max=0.0), self.momentum)
            self.high.lerp_(high.clamp(min=0.0), self.momentum)
        grid = self.grid()
        return torch.fake_quantize_per_tensor_affine(values, *grid)


class NearestWeight(nn.Module):
    """Weights to the nearest of their levels: in training once enabled, and when a graph is converted."""

    enabled = False
    levels: WeightLevels | None = None
    """Set by what has fitted the weights to levels already; None: fitted when they are needed."""

    def __init__(self, config: Uniform, place: Place) -> None:
        super().__init__()
        self.config = config
        self.bits = config.bits_of(next(iter(place.layers), ""), edge=place.edge)

    def fitted(self, weight: Tensor, smallest_scale: Tensor | None = None) -> WeightLevels:
        """The levels of `weight` (C, ...)."""
        config = self.config
        return self.levels or weight_levels(
            weight,
            self.bits,
            scheme=config.weight_scheme,
            per_tensor=config.weight_granularity == "tensor",
            group_size=config.group_size,
            mse=config.weight_range == "mse",
            smallest=smallest_scale,
        )

    def forward(self, weight: Tensor) -> Tensor:
        if not self.enabled:
            return weight
        levels = self.fitted(weight)
        if levels.symmetric_channels:
            zero_point = torch.zeros(len(weight), dtype=torch.int32, device=weight.device)
            grid = (levels.scale[:, 0], zero_point, 0, levels.low, levels.high)
            return torch.fake_quantize_per_channel_affine(weight, *grid)
        return weight + (levels.real(levels.integers(weight)) - weight).detach()

    def stored(self, weight: Tensor, smallest_scale: Tensor) -> Stored:
        """See `qsweep.hub.insert.WeightObserver`."""
        levels = self.fitted(weight, smallest_scale)
        integers = levels.integers(weight).to(torch.int8 if self.bits <= 8 else torch.int16)
        if levels.symmetric_channels:
            return Channels(integers, levels.scale[:, 0].contiguous(), levels.low, levels.high)
        return Groups(integers, levels.scale, levels.zero_point, levels.low, levels.high)
