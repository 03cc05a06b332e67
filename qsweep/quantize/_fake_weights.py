"""Fake quantizers of weights (C, ...): a scale for each channel, or each group of one, or the whole tensor."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from qsweep.hub.insert import Place
from qsweep.quantize._arithmetic import WeightLevels
from qsweep.quantize._fake import FakeWeight, learned_step, step_factor, straight_through, times
from qsweep.quantize._fused import Level
from qsweep.quantize.base import Uniform

_SMALLEST = 2.0**-10


def _grid(levels: WeightLevels) -> tuple[Level, int]:
    """Lowest level, less the zero point, and the number of levels less one."""
    bottom = float(levels.low) if levels.low == -levels.high else levels.low - levels.zero_point.unsqueeze(-1)
    return bottom, levels.high - levels.low


class RangeWeight(FakeWeight):
    """Levels fitted to the weights of each step."""

    def rounded(self, weight: Tensor, factor: Tensor | None = None) -> Tensor:
        weight = times(weight, factor)
        levels = self.fitted(weight.detach())
        parts = weight.reshape(*levels.scale.shape, -1)
        return straight_through(parts, levels.scale.unsqueeze(-1), *_grid(levels)).reshape(weight.shape)


class TanhWeight(RangeWeight):
    """Levels fitted to tanh of the weights of each step (DoReFa, equation 9), before any norm is folded in."""

    def rounded(self, weight: Tensor, factor: Tensor | None = None) -> Tensor:
        return super().rounded(weight.tanh(), factor)

    def integers(self, weight: Tensor, factor: Tensor | None = None) -> tuple[Tensor, WeightLevels]:
        return super().integers(weight.tanh(), factor)


class LearnedStepWeight(FakeWeight):
    """A learned step for each channel or group, or one for the tensor; a fitted zero point stays as it is (LSQ)."""

    steps: Tensor
    smallest: Tensor
    zero_point: Tensor

    def __init__(self, config: Uniform, place: Place) -> None:
        super().__init__(config, place)
        self.per_tensor = config.weight_granularity == "tensor"

    def begin(self, weight: Tensor) -> None:
        levels = self.fitted(weight)
        self.low, self.high, self.shape = levels.low, levels.high, tuple(levels.scale.shape)
        self.steps = nn.Parameter(levels.scale[:1, 0].clone() if self.per_tensor else levels.scale.flatten())
        self.register_buffer("smallest", self.steps.detach() * _SMALLEST)
        self.register_buffer("zero_point", levels.zero_point)

    def rounded(self, weight: Tensor, factor: Tensor | None = None) -> Tensor:
        weight = times(weight, factor)
        levels = self._levels()
        steps = self.steps.reshape(levels.scale.shape)
        scale = steps + (levels.scale - steps).detach()  # what is shipped; the gradient is that of the steps
        parts = weight.reshape(*steps.shape, -1)
        share = step_factor(parts.shape[2], self.high)
        return learned_step(parts, scale.unsqueeze(-1), *_grid(levels), share).reshape(weight.shape)

    def integers(self, weight: Tensor, factor: Tensor | None = None) -> tuple[Tensor, WeightLevels]:
        levels = self._levels()
        scale, zero_point = (value.expand(self.shape).contiguous() for value in (levels.scale, levels.zero_point))
        levels = replace(levels, scale=scale, zero_point=zero_point)
        return levels.integers(times(weight, factor)), levels

    def _levels(self) -> WeightLevels:
        """Those of the steps, with one row where the tensor shares a step."""
        zero_point = self.zero_point[:1] if self.per_tensor else self.zero_point
        return WeightLevels(self.steps.detach().reshape(zero_point.shape), zero_point, self.low, self.high)

    @torch.no_grad()
    def settle(self) -> None:
        self.steps.clamp_(min=self.smallest)
