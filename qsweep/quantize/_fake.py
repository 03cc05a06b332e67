"""Fake quantization: rounding to a grid in the forward pass, and what passes back through it.

A value v is put on n * scale with n = clamp(round_half_even(v * (1/scale)), bottom, top), top = bottom + steps. Level n
of a grid with zero point z is its integer less z, so `bottom` is `low - z` and `steps` is `high - low`. The same
arithmetic is shipped. `bottom` is a number where it never changes, else a tensor.

Each of these has few passes over its tensors: the gradient of a step, the sum of g * (n - v) inside the grid and g * n
beyond it, is (g . y - p . x) / scale of inputs x, outputs y, gradients g that arrive and p that pass. Multiplying by a
mask of booleans, as one would write it, took 4 times as long as all of this together.
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
_pass_between = torch.ops.aten.hardtanh_backward.default
"""`(gradient, values, low, high)`: the gradient where low < value < high, else 0, in one pass."""


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


def straight_through(values: Tensor, scale: Tensor, bottom: Level, steps: float) -> Tensor:
    """`values` on the grid; the gradient is 1 less than half a step beyond its ends, 0 further out."""
    return cast(Tensor, _StraightThrough.apply(values, scale, bottom, steps))  # type: ignore[no-untyped-call]


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
    found = _LearnedStep.apply(values, scale, offset, bottom, steps, factor)  # type: ignore[no-untyped-call]
    return cast(Tensor, found)


def learned_clip(values: Tensor, low: Tensor, high: Tensor, scale: Tensor, bottom: Level, steps: float) -> Tensor:
    """`values` on a grid between learned ends (PACT, equations 1 to 3).

    The gradient is that of the values in low < value < high, that of `high` at and over it, that of `low` at and under.
    """
    return cast(Tensor, _LearnedClip.apply(values, low, high, scale, bottom, steps))  # type: ignore[no-untyped-call]


def step_factor(shared_by: int, top: int) -> float:
    """Gradient scale of a learned step: 1 / sqrt(N * Qp) (LSQ, section 2.2)."""
    return 1.0 / math.sqrt(shared_by * top)


def _on_grid(values: Tensor, scale: Tensor, bottom: Level, steps: float) -> Tensor:
    levels = (values * (1 / scale)).round_()
    if isinstance(bottom, Tensor):  # clamping between tensors takes 18 times as long as between numbers
        return levels.sub_(bottom).clamp_(0, steps).add_(bottom).mul_(scale)
    return levels.clamp_(bottom, bottom + steps).mul_(scale)


def _passed(
    gradient: Tensor, values: Tensor, scale: Tensor, bottom: Level, steps: float, margin: float = 0.0
) -> Tensor:
    """The gradient where the value, in steps, is less than `margin` beyond the ends of the grid, else 0."""
    ratio = values * (1 / scale)
    low = 0.0 if isinstance(bottom, Tensor) else bottom
    if isinstance(bottom, Tensor):
        ratio.sub_(bottom)
    return cast(Tensor, _pass_between(gradient, ratio, low - margin, low + steps + margin))


def _contract(pairs: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]], shape: torch.Size) -> Tensor:
    """a . b - c . d for pairs (a, b) and (c, d), summed to `shape`, in float32."""
    (a, b), (c, d) = pairs
    alike = len({(x.stride(), x.dtype) for x in (a, b, c, d)}) == 1
    if not torch.compiler.is_compiling() and shape.numel() == 1 and alike and a.dtype is torch.float32 and _dense(a):
        return (torch.dot(_flat(a), _flat(b)) - torch.dot(_flat(c), _flat(d))).reshape(shape)
    return torch.addcmul(a * b, c, d, value=-1).float().sum_to_size(shape)


def _dense(values: Tensor) -> bool:
    return values.is_contiguous() or (values.dim() == 4 and values.is_contiguous(memory_format=torch.channels_last))


def _flat(values: Tensor) -> Tensor:
    """As one dimension, in the order of memory."""
    return values.as_strided((values.numel(),), (1,))


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, scale: Tensor, bottom: Level, steps: float) -> Tensor:
        ctx.save_for_backward(values, scale, bottom if isinstance(bottom, Tensor) else None)
        ctx.bottom, ctx.steps = bottom if not isinstance(bottom, Tensor) else None, steps
        return _on_grid(values, scale, bottom, steps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        values, scale, bottom = ctx.saved_tensors
        bottom = ctx.bottom if bottom is None else bottom
        return _passed(gradient, values, scale, bottom, ctx.steps, margin=0.5), None, None, None


class _LearnedStep(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, scale: Tensor, offset: Tensor | None, bottom: Level, steps: float, factor: float
    ) -> Tensor:
        outputs = _on_grid(values, scale, bottom, steps)
        ctx.save_for_backward(values, outputs, scale, offset, bottom if isinstance(bottom, Tensor) else None)
        ctx.bottom, ctx.steps, ctx.factor = bottom if not isinstance(bottom, Tensor) else None, steps, factor
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        values, outputs, scale, offset, bottom = ctx.saved_tensors
        bottom = ctx.bottom if bottom is None else bottom
        passed = _passed(gradient, values, scale, bottom, ctx.steps)
        step = _contract(((gradient, outputs), (passed, values)), scale.shape) / scale
        beyond = None
        if offset is not None:  # the ends move with the offset: what they add to the scale's gradient is its own
            beyond = gradient.sum(dtype=torch.float32) - passed.sum(dtype=torch.float32)
            step, beyond = step - bottom * beyond, beyond * ctx.factor
        return passed, step * ctx.factor, beyond, None, None, None


class _LearnedClip(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, low: Tensor, high: Tensor, scale: Tensor, bottom: Level, steps: float
    ) -> Tensor:
        ctx.save_for_backward(values, low, high)
        return _on_grid(values, scale, bottom, steps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        values, low, high = ctx.saved_tensors
        place = (values - low).mul_(1 / (high - low))
        passed = _pass_between(gradient, place, 0.0, 1.0)
        over = _contract(((gradient, place.clamp(0, 1)), (passed, place)), high.shape)
        beyond = gradient.sum(dtype=torch.float32) - passed.sum(dtype=torch.float32)
        return passed, beyond - over, over, None, None, None
