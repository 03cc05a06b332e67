"""Fake quantization: rounding to a grid in the forward pass, and what passes back through it.

A value v is put on n * scale with n = clamp(round_half_even(v * (1/scale)), bottom, top): level n of a grid with zero
point z is its integer less z, so `bottom` and `top` are `low - z` and `high - z`. The same arithmetic is shipped.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qsweep.hub.form import Grid
from qsweep.hub.insert import Place
from qsweep.quantize._arithmetic import WeightLevels
from qsweep.quantize._observers import NearestWeight, RangeObserver
from qsweep.quantize.base import Uniform

Level = float | Tensor


class FakeActivation(nn.Module):
    """Stands on an activation: observes, then, once started, rounds as it will be rounded when shipped."""

    enabled = False

    def __init__(self, config: Uniform, place: Place) -> None:
        super().__init__()
        self.config, self.place = config, place
        self.watch(16)

    def watch(self, bits: int) -> None:
        """Forget what was observed, and observe for a grid of `bits` bits or those of the config if they are more."""
        self.observer: RangeObserver | None = RangeObserver(self.config, self.place)
        self.observer.bits = self.bits = max(bits, self.observer.bits)
        self.enabled = False

    def start(self) -> None:
        """Round from now on, on the grid that was observed."""
        assert self.observer is not None
        self.begin(self.observer.grid())
        self.observer, self.enabled = None, True

    def begin(self, grid: Grid) -> None:
        raise NotImplementedError

    def rounded(self, values: Tensor) -> Tensor:
        raise NotImplementedError

    def grid(self) -> Grid:
        """See `qsweep.hub.insert.ActivationObserver`."""
        raise NotImplementedError

    def forward(self, values: Tensor) -> Tensor:
        if self.enabled:
            return self.rounded(values)
        return cast(Tensor, self.observer(values)) if self.observer is not None else values

    def penalty(self) -> Tensor | None:
        """What it adds to the loss."""
        return None

    def settle(self) -> None:
        """Called after each optimizer step: bring parameters back to where they mean something."""


class FakeWeight(NearestWeight):
    """Stands on a weight: lets it pass, then, once started, rounds it as it will be rounded when shipped."""

    def __init__(self, config: Uniform, place: Place) -> None:
        super().__init__(config, place)
        self.place = place
        self.last_bits = self.bits

    def start(self, weight: Tensor, bits: int) -> None:
        """Round from now on, to `bits` bits or those of the config if they are more, beginning with `weight`."""
        self.bits, self.enabled = max(bits, self.last_bits), True
        self.begin(weight.detach())

    def begin(self, weight: Tensor) -> None:
        """Fit what is trained to `weight` (C, ...)."""

    def rounded(self, weight: Tensor) -> Tensor:
        """`weight` on its grid, differentiable."""
        raise NotImplementedError

    def integers(self, weight: Tensor) -> tuple[Tensor, WeightLevels]:
        """The integers (float32, of the shape of `weight`) that `rounded` has used, and the levels they belong to."""
        levels = self.fitted(weight)
        return levels.integers(weight), levels

    def forward(self, weight: Tensor) -> Tensor:
        return self.rounded(weight) if self.enabled else weight

    def settle(self) -> None:
        """Called after each optimizer step: bring parameters back to where they mean something."""


def straight_through(values: Tensor, scale: Tensor, bottom: Level, top: Level) -> Tensor:
    """`values` on the grid; the gradient is 1 where the nearest level is on the grid, 0 beyond its ends."""
    return cast(Tensor, _StraightThrough.apply(values, scale, bottom, top))  # type: ignore[no-untyped-call]


def learned_step(values: Tensor, scale: Tensor, bottom: Level, top: Level, factor: float) -> Tensor:
    """`values` on the grid of a learned `scale`, which must broadcast over them (LSQ, equations 1 to 5).

    For v = value / scale, the gradient of the values is 1 in bottom < v < top, else 0; that of the scale is the sum of
    round(v) - v in between, `bottom` under and `top` over it, each times the gradient that arrives, times `factor`.
    """
    return cast(Tensor, _LearnedStep.apply(values, scale, None, bottom, top, factor))  # type: ignore[no-untyped-call]


def learned_step_and_offset(
    values: Tensor, scale: Tensor, offset: Tensor, bottom: Tensor, top: Tensor, factor: float
) -> Tensor:
    """The same with a learned lowest value: `bottom` is round(offset / scale) (LSQ+, equations 3 to 6).

    The gradient of the offset is 1 beyond the ends and 0 in between; that of the scale is 0 under the lower end and
    top - bottom over the upper one.
    """
    return cast(Tensor, _LearnedStep.apply(values, scale, offset, bottom, top, factor))  # type: ignore[no-untyped-call]


def learned_clip(values: Tensor, low: Tensor, high: Tensor, scale: Tensor, bottom: Level, top: Level) -> Tensor:
    """`values` on a grid between learned ends (PACT, equations 1 to 3).

    The gradient is that of the values in low <= value < high, that of `high` at and over it, that of `low` under it.
    """
    return cast(Tensor, _LearnedClip.apply(values, low, high, scale, bottom, top))  # type: ignore[no-untyped-call]


def step_factor(shared_by: int, top: int) -> float:
    """Gradient scale of a learned step: 1 / sqrt(N * Qp) (LSQ, section 2.2)."""
    return 1.0 / math.sqrt(shared_by * top)


def _on_grid(values: Tensor, scale: Tensor, bottom: Level, top: Level) -> Tensor:
    return (values * (1 / scale)).round_().clamp_(bottom, top).mul_(scale)  # type: ignore[arg-type]


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, scale: Tensor, bottom: Level, top: Level) -> Tensor:
        levels = (values * (1 / scale)).round_()
        clamped = levels.clamp(bottom, top)  # type: ignore[arg-type]
        ctx.save_for_backward(levels == clamped)
        return clamped.mul_(scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (inside,) = ctx.saved_tensors
        return gradient * inside, None, None, None


class _LearnedStep(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, scale: Tensor, offset: Tensor | None, bottom: Level, top: Level, factor: float
    ) -> Tensor:
        ends = [end if isinstance(end, Tensor) else None for end in (bottom, top)]
        ctx.save_for_backward(values, scale, offset, *ends)
        ctx.ends, ctx.factor = (bottom if ends[0] is None else None, top if ends[1] is None else None), factor
        return _on_grid(values, scale, bottom, top)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        values, scale, offset, *ends = ctx.saved_tensors
        bottom, top = (fixed if end is None else end for fixed, end in zip(ctx.ends, ends, strict=True))
        ratio = values * (1 / scale)
        inside = (ratio > bottom) & (ratio < top)
        passed = gradient * inside
        slope = ratio.clamp(bottom, top).round_().sub_(ratio.mul_(inside))
        beyond = None
        if offset is not None:  # the ends move with the offset: what they add to the scale's gradient is its own
            slope.sub_(torch.where(inside, 0.0, bottom))
            beyond = (gradient - passed).sum_to_size(offset.shape).mul_(ctx.factor)
        step = slope.mul_(gradient).sum_to_size(scale.shape).mul_(ctx.factor)
        return passed, step, beyond, None, None, None


class _LearnedClip(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, low: Tensor, high: Tensor, scale: Tensor, bottom: Level, top: Level
    ) -> Tensor:
        ctx.save_for_backward(values, low, high)
        return _on_grid(values, scale, bottom, top)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        values, low, high = ctx.saved_tensors
        over, under = values >= high, values < low
        raised, lowered = (gradient * over).sum(), (gradient * under).sum()
        return gradient.masked_fill(over | under, 0.0), lowered, raised, None, None, None
