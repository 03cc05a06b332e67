"""Fake quantizers of activations: one scale and zero point a tensor."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qsweep.hub.form import Grid
from qsweep.hub.insert import Place
from qsweep.quantize._fake import FakeActivation, learned_step, learned_step_and_offset, step_factor, straight_through
from qsweep.quantize.base import Uniform

_SMALLEST = 2.0**-10
"""A learned scale falls no lower than this share of what it started from: under zero it would mean nothing."""


class LearnedStep(FakeActivation):
    """A learned step, and a learned offset where the tensor is asymmetric and can be negative (LSQ, LSQ+)."""

    scale: Tensor
    offset: Tensor
    smallest: Tensor

    def __init__(self, config: Uniform, place: Place) -> None:
        super().__init__(config, place)
        self.learns_offset = config.activation_scheme == "asymmetric" and not place.nonnegative
        self.zero_point = 0

    def begin(self, grid: Grid) -> None:
        self.low, self.high, self.zero_point = grid.low, grid.high, grid.zero_point
        self.scale = nn.Parameter(torch.tensor(grid.scale))
        self.register_buffer("smallest", torch.tensor(grid.scale * _SMALLEST))
        if self.learns_offset:
            self.offset = nn.Parameter(torch.tensor((grid.low - grid.zero_point) * grid.scale))

    def rounded(self, values: Tensor) -> Tensor:
        factor = step_factor(values[0].numel(), self.high - self.zero_point)
        if not self.learns_offset:
            bottom, top = float(self.low - self.zero_point), float(self.high - self.zero_point)
            return learned_step(values, self.scale, bottom, top, factor)
        bottom_level = self._bottom()
        top_level = bottom_level + (self.high - self.low)
        factor = step_factor(values[0].numel(), self.high - self.low)
        return learned_step_and_offset(values, self.scale, self.offset, bottom_level, top_level, factor)

    def _bottom(self) -> Tensor:
        """Lowest level, at most 0 and such that 0 is on the grid."""
        with torch.no_grad():
            return (self.offset / self.scale).round().clamp(self.low - self.high, 0)

    def grid(self) -> Grid:
        zero_point = self.low - int(self._bottom().item()) if self.learns_offset else self.zero_point
        return Grid(self.scale.item(), zero_point, self.low, self.high)

    @torch.no_grad()
    def settle(self) -> None:
        self.scale.clamp_(min=self.smallest)


class MovingRange(FakeActivation):
    """A range that follows the batches: moving averages of their ends (Jacob et al. 2018, section 3.1)."""

    momentum = 0.01
    lowest: Tensor
    highest: Tensor

    def begin(self, grid: Grid) -> None:
        self.low, self.high = grid.low, grid.high
        ends = ((end - grid.zero_point) * grid.scale for end in (grid.low, grid.high))
        for name, end in zip(("lowest", "highest"), ends, strict=True):
            self.register_buffer(name, torch.tensor(end, dtype=torch.float32))

    def rounded(self, values: Tensor) -> Tensor:
        if self.training:
            self._follow(values)
        scale, bottom = self._grid()
        return straight_through(values, scale, bottom, bottom + (self.high - self.low))

    def _follow(self, values: Tensor) -> None:
        low, high = values.detach().aminmax()
        self.lowest.lerp_(low.float().clamp(max=0.0), self.momentum)
        self.highest.lerp_(high.float().clamp(min=0.0), self.momentum)

    def _grid(self) -> tuple[Tensor, Tensor]:
        """Scale and lowest level: as `activation_grid`, in tensors, so that it can be compiled."""
        low, high, steps = self.lowest, self.highest, self.high - self.low
        if self.place.nonnegative:
            low = torch.zeros_like(low)
        elif self.config.activation_scheme == "symmetric":
            high = torch.maximum(-low, high)
            low = -high * ((steps + 1) // 2) / (steps // 2)
        scale = (high - low) / steps
        scale = torch.where(scale < torch.finfo(torch.float32).tiny * 2**24, torch.ones_like(scale), scale)
        return scale, (low / scale).round().clamp(-steps, 0)

    def grid(self) -> Grid:
        scale, bottom = self._grid()
        return Grid(scale.item(), self.low - int(bottom.item()), self.low, self.high)
