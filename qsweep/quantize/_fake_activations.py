"""Fake quantizers of activations: one scale and zero point a tensor."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qsweep.hub.form import Grid, RowGrid
from qsweep.hub.insert import Place
from qsweep.hub.ops import LEAST_SCALE, row_scale
from qsweep.quantize._arithmetic import EMPTY_SCALE
from qsweep.quantize._fake import (
    FakeActivation,
    learned_clip,
    learned_step,
    step_factor,
    straight_through,
    straight_through_observed,
)
from qsweep.quantize._observers import activation_bits
from qsweep.quantize.base import Uniform

_SMALLEST = 2.0**-10
"""A learned scale falls no lower than this share of what it started from: under zero it would mean nothing."""


class LearnedStep(FakeActivation):
    """A learned step, and a learned offset where the tensor is asymmetric and can be negative (LSQ, LSQ+).

    That of the model's inputs stays as calibrated: its gradient would need that of the first layer's inputs, which
    nothing else asks for (1.6 ms of the 15.6 of a step of a ResNet-18 on an H100).
    """

    scale: Tensor
    offset: Tensor
    smallest: Tensor

    def __init__(self, config: Uniform, place: Place) -> None:
        super().__init__(config, place)
        self.learns_offset = config.activation_scheme == "asymmetric" and not (place.nonnegative or place.inputs)
        self.zero_point = 0

    def begin(self, grid: Grid) -> None:
        self.low, self.high, self.zero_point = grid.low, grid.high, grid.zero_point
        self.scale = nn.Parameter(torch.tensor(grid.scale), requires_grad=not self.place.inputs)
        self.register_buffer("smallest", torch.tensor(grid.scale * _SMALLEST))
        if self.learns_offset:
            self.offset = nn.Parameter(torch.tensor((grid.low - grid.zero_point) * grid.scale))

    def rounded(self, values: Tensor) -> Tensor:
        features, steps = values[0].numel(), self.high - self.low
        if self.learns_offset:
            return learned_step(values, self.scale, self._bottom(), steps, step_factor(features, steps), self.offset)
        factor = step_factor(features, self.high - self.zero_point)
        return learned_step(values, self.scale, float(self.low - self.zero_point), steps, factor)

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


class TokenGrids(FakeActivation):
    """A symmetric grid for each row, which it sets itself (`activation_mode: token`): nothing is learned."""

    joins = False

    def watch(self, bits: int) -> None:
        self.bits, self.observer, self.enabled = max(bits, activation_bits(self.config, self.place)), None, False

    def start(self) -> None:
        self.enabled = True

    def rounded(self, values: Tensor) -> Tensor:
        values, high = values.float(), self.grid().high
        return straight_through(values, row_scale(values, high), float(-high), 2 * high)

    def grid(self) -> RowGrid:
        return RowGrid.of(self.bits)


class EndsOfRange(FakeActivation):
    """A grid between `lowest` and `highest`: zero on it, as `activation_grid` makes it, but in tensors."""

    lowest: Tensor
    highest: Tensor

    def begin(self, grid: Grid) -> None:
        self.low, self.high = grid.low, grid.high
        ends = ((end - grid.zero_point) * grid.scale for end in (grid.low, grid.high))
        self.hold(*(torch.tensor(end, dtype=torch.float32) for end in ends))

    def hold(self, lowest: Tensor, highest: Tensor) -> None:
        self.register_buffer("lowest", lowest)
        self.register_buffer("highest", highest)

    def ends(self) -> tuple[Tensor, Tensor]:
        """Lowest and highest value as the scheme has them: differentiable."""
        steps = self.high - self.low
        if self.place.nonnegative:
            return torch.zeros_like(self.highest), self.highest
        if self.config.activation_scheme == "symmetric":
            highest = torch.maximum(-self.lowest, self.highest)
            return -highest * ((steps + 1) // 2) / (steps // 2), highest
        return self.lowest, self.highest

    @torch.no_grad()
    def levels(self) -> tuple[Tensor, Tensor | float, int]:
        """Scale, lowest level and their number less one."""
        lowest, highest = self.ends()
        steps = self.high - self.low
        scale = (highest - lowest) / steps
        scale = torch.where(scale < LEAST_SCALE, EMPTY_SCALE, scale)
        return scale, 0.0 if self.place.nonnegative else (lowest / scale).round().clamp(-steps, 0), steps

    def grid(self) -> Grid:
        scale, bottom, _ = self.levels()
        return Grid(scale.item(), self.low - int(bottom), self.low, self.high)


class MovingRange(EndsOfRange):
    """A range that follows the batches: moving averages of their ends (Jacob et al. 2018, section 3.1).

    A batch is rounded to the range of those before it, so that one pass over it does both.
    """

    momentum = 0.01

    def rounded(self, values: Tensor) -> Tensor:
        if not self.training:
            return straight_through(values, *self.levels(), rectified=self.place.nonnegative)
        found = straight_through_observed(values, *self.levels(), rectified=self.place.nonnegative)
        outputs, lowest, highest = found
        with torch.no_grad():
            self.lowest.lerp_(lowest.clamp(max=0.0), self.momentum)
            self.highest.lerp_(highest.clamp(min=0.0), self.momentum)
        return outputs


class FixedClip(EndsOfRange):
    """The calibrated range; gradients stop at its ends (DoReFa)."""

    def rounded(self, values: Tensor) -> Tensor:
        low, high = self.ends()
        return learned_clip(values, low, high, *self.levels())


class LearnedClip(FixedClip):
    """Learned ends (PACT): the upper one, and the lower one of asymmetric tensors that can be negative.

    Those of the model's inputs stay as calibrated, as in `LearnedStep`.
    """

    smallest: Tensor

    def __init__(self, config: Uniform, place: Place, decay: float) -> None:
        super().__init__(config, place)
        self.decay = decay
        self.learns_lowest = config.activation_scheme == "asymmetric" and not place.nonnegative

    def hold(self, lowest: Tensor, highest: Tensor) -> None:
        learns = not self.place.inputs
        self.highest = nn.Parameter(highest, requires_grad=learns)
        self.register_buffer("smallest", highest * _SMALLEST)
        if self.learns_lowest:
            self.lowest = nn.Parameter(lowest, requires_grad=learns)

    def ends(self) -> tuple[Tensor, Tensor]:
        if self.learns_lowest or self.place.nonnegative:
            return super().ends()
        steps = self.high - self.low
        return -self.highest * ((steps + 1) // 2) / (steps // 2), self.highest

    def penalty(self) -> Tensor | None:
        """What pulls the ends towards zero (section 3 of the paper)."""
        if self.place.inputs:
            return None
        squares = self.highest.square() + (self.lowest.square() if self.learns_lowest else 0)
        return self.decay / 2 * squares

    @torch.no_grad()
    def settle(self) -> None:
        self.highest.clamp_(min=self.smallest)
        if self.learns_lowest:
            self.lowest.clamp_(max=0.0)
