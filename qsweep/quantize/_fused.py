"""Fake quantization in one pass forward and one back, where there are kernels for that: see `_fake`, the reference.

What is saved for the way back are the values as they came; the rounding is done again there, which is quicker than to
write and read what came of it.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qsweep.machine import no_kernels
from qsweep.quantize import _loops

Level = float | Tensor


class Kernels(Protocol):
    """Values and gradients are dense, in one layout and of one type. Sums are float32, of a fixed order."""

    def takes(self, values: Tensor) -> bool:
        """Whether the others are for these, if they fit."""

    def on_grid(self, values: Tensor, scale: Tensor, bottom: Level, steps: float) -> Tensor:
        """`values` on the grid."""

    def step_backward(
        self,
        gradient: Tensor,
        values: Tensor,
        scale: Tensor,
        bottom: Level,
        steps: float,
        margins: tuple[float, float],
        *,
        sums: bool,
        offset: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The gradient less than `margins` beyond the ends, in steps; with `sums`, what the step's gradient is, of the
        shape of `scale`; with a learned `offset`, the sum of what does not pass."""

    def clip_backward(
        self, gradient: Tensor, values: Tensor, low: Tensor, high: Tensor, *, sums: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The gradient between `low` and `high`; with `sums`, those of `low` and of `high`."""


def kernels_for(values: Tensor, scale: Tensor, bottom: Level) -> Kernels | None:
    """What does these tensors in one pass; None where plain ops are to do it.

    Under `torch.compile` plain ops are: it puts them into the kernels of what stands before and behind, a norm or a
    sum, which saves the pass each way that a kernel of one's own takes.
    """
    if torch.compiler.is_compiling() or not fits(values, scale, bottom):
        return None
    kernels = _of(values.device.type)
    return kernels if kernels is not None and kernels.takes(values) else None


def fits(values: Tensor, scale: Tensor, bottom: Level) -> bool:
    """Whether kernels are made for these: float32 or bf16 values, dense in memory, one scale for all or, for contiguous
    float32 values, one for each of their last dimension's rows; `bottom` a number, or one, or as many as scales."""
    rows = tuple(scale.shape) == (*values.shape[:-1], 1) and values.is_contiguous()
    one = scale.numel() == 1 and scale.dim() <= values.dim()
    exact = values.dtype is torch.float32 or (values.dtype is torch.bfloat16 and scale.dim() == 0)
    known = not isinstance(bottom, Tensor) or (
        bottom.dtype is torch.float32 and (bottom.numel() == 1 or bottom.shape == scale.shape)
    )
    return (rows or one) and exact and known and scale.dtype is torch.float32 and values.numel() > 0 and dense(values)


def extremes(values: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the greatest of `values`, in one pass where that is to be had."""
    ready = values.device.type == "cpu" and not torch.compiler.is_compiling() and dense(values)
    if ready and values.dtype in (torch.float32, torch.bfloat16) and values.numel() > 0 and _loops.takes(values):
        return _loops.extremes(values)
    return values.amin().float(), values.amax().float()  # `aminmax` takes 10 times as long as both


@cache
def _of(device: str) -> Kernels | None:
    if device == "cpu":
        return _loops
    if device != "cuda" or no_kernels() is not None:
        return None
    from qsweep.cuda import fake_quantize

    return fake_quantize


def straight_through(
    kernels: Kernels, values: Tensor, scale: Tensor, bottom: Level, steps: float, margins: tuple[float, float]
) -> Tensor:
    """See `_fake`."""
    found = _StraightThrough.apply(kernels, values, scale, bottom, steps, margins)  # type: ignore[no-untyped-call]
    return cast(Tensor, found)


def observes(values: Tensor, scale: Tensor, bottom: Level) -> bool:
    """Whether the loop that rounds can look for the extremes, too."""
    return kernels_for(values, scale, bottom) is _loops


def straight_through_observed(
    values: Tensor, scale: Tensor, bottom: Level, steps: float, margins: tuple[float, float]
) -> tuple[Tensor, Tensor, Tensor]:
    """See `_fake`; where `observes`."""
    found = _Observed.apply(values, scale, bottom, steps, margins)  # type: ignore[no-untyped-call]
    return cast(tuple[Tensor, Tensor, Tensor], found)


def learned_step(
    kernels: Kernels, values: Tensor, scale: Tensor, bottom: Level, steps: float, factor: float, offset: Tensor | None
) -> Tensor:
    """See `_fake`."""
    found = _LearnedStep.apply(kernels, values, scale, offset, bottom, steps, factor)  # type: ignore[no-untyped-call]
    return cast(Tensor, found)


def learned_clip(
    kernels: Kernels, values: Tensor, low: Tensor, high: Tensor, scale: Tensor, bottom: Level, steps: float
) -> Tensor:
    """See `_fake`."""
    found = _LearnedClip.apply(kernels, values, low, high, scale, bottom, steps)  # type: ignore[no-untyped-call]
    return cast(Tensor, found)


def dense(values: Tensor) -> bool:
    """Whether memory is gone over without gaps."""
    return values.is_contiguous() or (values.dim() == 4 and values.is_contiguous(memory_format=torch.channels_last))


def alike(gradient: Tensor, other: Tensor) -> Tensor:
    """`gradient` in the layout of `other`: what goes over both then goes over memory in one direction."""
    if torch.compiler.is_compiling() or gradient.stride() == other.stride():
        return gradient
    return torch.empty_like(other).copy_(gradient)


def _save(ctx: Any, kernels: Kernels, values: Tensor, scale: Tensor, bottom: Level, steps: float) -> None:
    """All that the way back needs."""
    moving = bottom if isinstance(bottom, Tensor) else None
    ctx.save_for_backward(values, scale, moving)
    ctx.kernels, ctx.bottom, ctx.steps = kernels, bottom if moving is None else None, steps


def _keep(ctx: Any, kernels: Kernels, values: Tensor, scale: Tensor, bottom: Level, steps: float) -> Tensor:
    """Save all that the way back needs; returns the values on the grid."""
    _save(ctx, kernels, values, scale, bottom, steps)
    return kernels.on_grid(values, scale, bottom, steps)


def _step_backward(
    ctx: Any, gradient: Tensor, margins: tuple[float, float], *, sums: bool, offset: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    values, scale, moving = ctx.saved_tensors
    bottom, kernels = ctx.bottom if moving is None else moving, cast(Kernels, ctx.kernels)
    gradient = alike(gradient, values)
    return kernels.step_backward(gradient, values, scale, bottom, ctx.steps, margins, sums=sums, offset=offset)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        kernels: Kernels,
        values: Tensor,
        scale: Tensor,
        bottom: Level,
        steps: float,
        margins: tuple[float, float],
    ) -> Tensor:
        ctx.margins = margins
        return _keep(ctx, kernels, values, scale, bottom, steps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        passed, _, _ = _step_backward(ctx, gradient, ctx.margins, sums=False, offset=False)
        return None, passed, None, None, None, None


class _Observed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, scale: Tensor, bottom: Level, steps: float, margins: tuple[float, float]
    ) -> tuple[Tensor, Tensor, Tensor]:
        _save(ctx, _loops, values, scale, bottom, steps)
        ctx.margins = margins
        outputs, lowest, highest = _loops.on_grid_observed(values, scale, bottom, steps)
        ctx.mark_non_differentiable(lowest, highest)
        return outputs, lowest, highest

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        passed, _step, _beyond = _step_backward(ctx, gradient, ctx.margins, sums=False, offset=False)
        return passed, None, None, None, None


class _LearnedStep(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        kernels: Kernels,
        values: Tensor,
        scale: Tensor,
        offset: Tensor | None,
        bottom: Level,
        steps: float,
        factor: float,
    ) -> Tensor:
        ctx.factor, ctx.learns_offset = factor, offset is not None
        return _keep(ctx, kernels, values, scale, bottom, steps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        passed, step, beyond = _step_backward(ctx, gradient, (0.0, 0.0), sums=True, offset=ctx.learns_offset)
        assert step is not None
        return None, passed, step * ctx.factor, None if beyond is None else beyond * ctx.factor, None, None, None


class _LearnedClip(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        kernels: Kernels,
        values: Tensor,
        low: Tensor,
        high: Tensor,
        scale: Tensor,
        bottom: Level,
        steps: float,
    ) -> Tensor:
        ctx.save_for_backward(values, low, high)
        ctx.kernels = kernels
        return kernels.on_grid(values, scale, bottom, steps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        values, low, high = ctx.saved_tensors
        learns = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
        found = cast(Kernels, ctx.kernels).clip_backward(alike(gradient, values), values, low, high, sums=learns)
        return None, *found, None, None, None
