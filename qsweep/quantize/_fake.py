"""Fake quantization: rounding to a grid in the forward pass, and what passes back through it.

A value v is put on n * scale with n = clamp(round_half_even(v * (1/scale)), bottom, top), top = bottom + steps. Level n
of a grid with zero point z is its integer less z, so `bottom` is `low - z` and `steps` is `high - low`. The same
arithmetic is shipped. `bottom` is a number where it never changes, else a tensor.

Each of these has few passes over its tensors: the gradient of a step, the sum of g * (n - v) inside the grid and g * n
beyond it, is g . n - p . v with the gradients g that arrive and p that pass. Multiplying by a mask of booleans, as one
would write it, took 4 times as long as all of this together.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qsweep.hub.form import Grid, RowGrid
from qsweep.hub.insert import Place
from qsweep.quantize import _fused
from qsweep.quantize._arithmetic import WeightLevels
from qsweep.quantize._fused import Level, alike, dense, kernels_for
from qsweep.quantize._observers import NearestWeight, RangeObserver
from qsweep.quantize.base import Uniform

_pass_between = torch.ops.aten.hardtanh_backward.default
"""`(gradient, values, low, high)`: the gradient where low < value < high, else 0, in one pass."""


class FakeActivation(nn.Module):
    """Stands on an activation: observes, then, once started, rounds as it will be rounded when shipped."""

    enabled = False
    joins = True
    """Whether it can stand for a ReLU before it, too: a grid that begins at 0 does what that does."""
    rectifies = False
    """Whether it does."""

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

    def grid(self) -> Grid | RowGrid:
        """See `qsweep.hub.insert.ActivationObserver`."""
        raise NotImplementedError

    def forward(self, values: Tensor) -> Tensor:
        if self.enabled:
            return self.rounded(values)
        values = values.relu() if self.rectifies else values
        return cast(Tensor, self.observer(values)) if self.observer is not None else values

    def penalty(self) -> Tensor | None:
        """What it adds to the loss."""
        return None

    def settle(self) -> None:
        """Called after each optimizer step: bring parameters back to where they mean something."""


class FakeWeight(NearestWeight):
    """Stands on a weight: lets it pass, then, once started, rounds it as it will be rounded when shipped."""

    enabled = False

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

    def rounded(self, weight: Tensor, factor: Tensor | None = None) -> Tensor:
        """`weight`, its channels times `factor` (C,) of the norm behind it, on its grid, differentiable."""
        raise NotImplementedError

    def integers(self, weight: Tensor, factor: Tensor | None = None) -> tuple[Tensor, WeightLevels]:
        """The integers (float32, of the shape of `weight`) that `rounded` has used, and the levels they belong to."""
        weight = times(weight, factor)
        levels = self.fitted(weight)
        return levels.integers(weight), levels

    def forward(self, weight: Tensor, factor: Tensor | None = None) -> Tensor:
        return self.rounded(weight, factor) if self.enabled else times(weight, factor)

    def settle(self) -> None:
        """Called after each optimizer step: bring parameters back to where they mean something."""


def times(weight: Tensor, factor: Tensor | None) -> Tensor:
    """`weight` (C, ...), its channels times `factor` (C,) if there is one."""
    return weight if factor is None else weight * factor.reshape(-1, *[1] * (weight.dim() - 1))


def straight_through(values: Tensor, scale: Tensor, bottom: Level, steps: float, *, rectified: bool = False) -> Tensor:
    """`values` on the grid; the gradient is 1 less than half a step beyond its ends, 0 further out.

    `rectified`: 0 already from the lower end on, as that of a ReLU.
    """
    margins = (0.0 if rectified else 0.5, 0.5)
    if kernels := kernels_for(values, scale, bottom):
        return _fused.straight_through(kernels, values, scale, bottom, steps, margins)
    found = _StraightThrough.apply(values, scale, bottom, steps, margins)  # type: ignore[no-untyped-call]
    return cast(Tensor, found)


def straight_through_observed(
    values: Tensor, scale: Tensor, bottom: Level, steps: float, *, rectified: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """`straight_through` on one grid, and the least and the greatest of `values`: in one pass where there is one."""
    if _fused.observes(values, scale, bottom):
        margins = (0.0 if rectified else 0.5, 0.5)
        return _fused.straight_through_observed(values, scale, bottom, steps, margins)
    return straight_through(values, scale, bottom, steps, rectified=rectified), *_fused.extremes(values.detach())


def learned_step(
    values: Tensor, scale: Tensor, bottom: Level, steps: float, factor: float, offset: Tensor | None = None
) -> Tensor:
    """`values` on the grid of a learned `scale`, which must broadcast over them (LSQ, equations 1 to 5).

    For v = value / scale, the gradient of the values is 1 in bottom < v < top, else 0; that of the scale is the sum of
    round(v) - v in between, `bottom` under and `top` over it, each times the gradient that arrives, times `factor`.

    With a learned `offset`, of which `bottom` is round(offset / scale), the gradient of the scale is 0 under the lower
    end and `steps` over the upper one; that of the offset is 1 beyond the ends and 0 in between (LSQ+, equations 3 to
    6).
    """
    if kernels := kernels_for(values, scale, bottom):
        return _fused.learned_step(kernels, values, scale, bottom, steps, factor, offset)
    found = _LearnedStep.apply(values, scale, offset, bottom, steps, factor)  # type: ignore[no-untyped-call]
    return cast(Tensor, found)


def learned_clip(values: Tensor, low: Tensor, high: Tensor, scale: Tensor, bottom: Level, steps: float) -> Tensor:
    """`values` on a grid between learned ends (PACT, equations 1 to 3).

    The gradient is that of the values in low < value < high, that of `high` at and over it, that of `low` at and under.
    """
    if kernels := kernels_for(values, scale, bottom):
        return _fused.learned_clip(kernels, values, low, high, scale, bottom, steps)
    return cast(Tensor, _LearnedClip.apply(values, low, high, scale, bottom, steps))  # type: ignore[no-untyped-call]


def step_factor(shared_by: int, top: int) -> float:
    """Gradient scale of a learned step: 1 / sqrt(N * Qp) (LSQ, section 2.2)."""
    return 1.0 / math.sqrt(shared_by * top)


def _on_grid(values: Tensor, scale: Tensor, bottom: Level, steps: float) -> tuple[Tensor, Tensor]:
    """`values` on the grid, and v - bottom or, where that is a number, v: what `_passed` needs."""
    ratio = values * (1 / scale)
    levels = ratio.round()
    if isinstance(bottom, Tensor):  # clamping between tensors takes 18 times as long as between numbers
        return levels.sub_(bottom).clamp_(0, steps).add_(bottom).mul_(scale), ratio.sub_(bottom)
    return levels.clamp_(bottom, bottom + steps).mul_(scale), ratio


def _passed(
    gradient: Tensor, ratio: Tensor, bottom: Level, steps: float, margins: tuple[float, float] = (0.0, 0.0)
) -> Tensor:
    """The gradient where the value, in steps, is less than `margins` beyond the ends of the grid, else 0."""
    low = 0.0 if isinstance(bottom, Tensor) else bottom
    return cast(Tensor, _pass_between(gradient, ratio, low - margins[0], low + steps + margins[1]))


def _inside(ratio: Tensor, bottom: Level, steps: float, margins: tuple[float, float]) -> Tensor:
    """uint8: 1 where `_passed` lets pass, made without comparing.

    Of a comparison the compiler would save booleans, which it writes one by one on a CPU: a compiled step took 2.0
    to 2.6 times that of the float model, with these numbers 1.3 to 1.4.
    """
    low = 0.0 if isinstance(bottom, Tensor) else bottom
    between = (ratio - (low - margins[0])) * ((low + steps + margins[1]) - ratio)
    return between.sign().clamp(0, 1).to(torch.uint8)


def _dot(a: Tensor, b: Tensor, shape: torch.Size) -> Tensor:
    """a * b summed to `shape`, in float32; both in one layout."""
    if shape.numel() > 1 or torch.compiler.is_compiling() or not dense(a):
        return (a * b).float().sum_to_size(shape)
    if a.dtype is torch.float32:
        return torch.dot(_flat(a), _flat(b)).reshape(shape)  # one pass instead of two
    return _sum(a * b).reshape(shape)


def _sum(values: Tensor) -> Tensor:
    """In float32."""
    if values.dtype is torch.float32 or values.dim() < 2 or torch.compiler.is_compiling() or not dense(values):
        return values.sum(dtype=torch.float32)
    return _flat(values).view(len(values), -1).sum(1).float().sum()  # bf16: sum(dtype=float32) takes 5 times as long


def _flat(values: Tensor) -> Tensor:
    """As one dimension, in the order of memory."""
    return values.as_strided((values.numel(),), (1,))


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, scale: Tensor, bottom: Level, steps: float, margins: tuple[float, float]
    ) -> Tensor:
        outputs, ratio = _on_grid(values, scale, bottom, steps)
        saved = _inside(ratio, bottom, steps, margins) if torch.compiler.is_compiling() else ratio
        ctx.save_for_backward(saved, bottom if isinstance(bottom, Tensor) else None)
        ctx.bottom, ctx.steps, ctx.margins = bottom if not isinstance(bottom, Tensor) else None, steps, margins
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        saved, bottom = ctx.saved_tensors
        if saved.dtype is torch.uint8:
            return gradient * saved, None, None, None, None
        bottom = ctx.bottom if bottom is None else bottom
        return _passed(alike(gradient, saved), saved, bottom, ctx.steps, ctx.margins), None, None, None, None


class _LearnedStep(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, scale: Tensor, offset: Tensor | None, bottom: Level, steps: float, factor: float
    ) -> Tensor:
        outputs, ratio = _on_grid(values, scale, bottom, steps)
        ctx.save_for_backward(ratio, outputs, scale, bottom if isinstance(bottom, Tensor) else None)
        ctx.bottom, ctx.steps, ctx.factor = bottom if not isinstance(bottom, Tensor) else None, steps, factor
        ctx.learns_offset = offset is not None
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        ratio, outputs, scale, bottom = ctx.saved_tensors
        gradient = alike(gradient, ratio)
        passed = _passed(gradient, ratio, ctx.bottom if bottom is None else bottom, ctx.steps)
        step = _dot(gradient, outputs, scale.shape) / scale - _dot(passed, ratio, scale.shape)
        beyond = None
        if bottom is not None:  # `ratio` is v - bottom then
            shape = scale.shape
            step = step - bottom * (_sum(gradient) if ctx.learns_offset else passed.sum_to_size(shape))
        if ctx.learns_offset:  # the ends move with the offset: what they add to the scale's gradient is its own
            beyond = (_sum(gradient) - _sum(passed)) * ctx.factor
        return passed, step * ctx.factor, beyond, None, None, None


class _LearnedClip(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, low: Tensor, high: Tensor, scale: Tensor, bottom: Level, steps: float
    ) -> Tensor:
        ctx.save_for_backward(values, low, high)
        return _on_grid(values, scale, bottom, steps)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        values, low, high = ctx.saved_tensors
        place = (values - low).mul_(1 / (high - low))
        gradient = alike(gradient, place)
        passed = _pass_between(gradient, place, 0.0, 1.0)
        lowered = raised = None
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            raised = _dot(gradient, place.clamp(0, 1), high.shape) - _dot(passed, place, high.shape)
            lowered = _sum(gradient) - _sum(passed) - raised
        return passed, lowered, raised, None, None, None
