"""Modules that stand on a graph's values: observers while calibrating, fake quantizers while training."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qsweep.errors import NotFinite
from qsweep.hub.form import Grid
from qsweep.quantize._arithmetic import activation_grid, quantize_weight, weight_scale
from qsweep.quantize.base import Uniform


class RangeObserver(nn.Module):
    """Keeps the smallest and largest value that passes (min-max calibration)."""

    low: Tensor
    high: Tensor

    def __init__(self, config: Uniform, *, nonnegative: bool) -> None:
        super().__init__()
        self.config, self.nonnegative = config, nonnegative
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
        config = self.config
        return activation_grid(
            self.low.item(),
            self.high.item(),
            config.activation_bits,
            config.activation_scheme,
            nonnegative=self.nonnegative,
        )


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
    """Weights to the nearest level of their channel: in training once enabled, and when a graph is converted."""

    enabled = False

    def __init__(self, config: Uniform) -> None:
        super().__init__()
        self.bits = config.weight_bits

    def forward(self, weight: Tensor) -> Tensor:
        if not self.enabled:
            return weight
        top = (1 << (self.bits - 1)) - 1
        scale = weight_scale(weight, self.bits)
        zero_point = torch.zeros(len(scale), dtype=torch.int32, device=scale.device)
        return torch.fake_quantize_per_channel_affine(weight, scale, zero_point, 0, -top, top)

    def integers(self, weight: Tensor, smallest_scale: Tensor) -> tuple[Tensor, Tensor, int, int]:
        """See `qsweep.hub.insert.WeightObserver`."""
        scale = weight_scale(weight, self.bits, smallest_scale)
        top = (1 << (self.bits - 1)) - 1
        return quantize_weight(weight, scale, self.bits), scale, -top, top
