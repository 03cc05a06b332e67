"""Fake quantization in one pass forward and one back: see `qsweep.quantize._fake`, whose values these are, to the bit.

What is saved for the way back are the values as they came; the rounding is done again there. Sums are taken block by
block and then over the blocks, in an order that depends on shapes alone: the same bits each time.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qsweep.cuda._fake_quantize import clip_backward, round_to_grid, step_backward
from qsweep.cuda._launch import EXACT, power_of_two

_BLOCK = 2048
"""Elements of a program: 16 of each of its threads."""


def takes(values: Tensor, scale: Tensor, bottom: float | Tensor) -> bool:
    """Whether the kernels are for these: float32 or bf16 values, dense in memory, one scale for all or, for contiguous
    float32 values, one for each of their last dimension's rows; `bottom` a number, or one, or as many as scales."""
    rows = tuple(scale.shape) == (*values.shape[:-1], 1) and values.is_contiguous()
    one = scale.numel() == 1 and scale.dim() <= values.dim()
    exact = values.dtype is torch.float32 or (values.dtype is torch.bfloat16 and scale.dim() == 0)
    fits = not isinstance(bottom, Tensor) or (
        bottom.dtype is torch.float32 and (bottom.numel() == 1 or bottom.shape == scale.shape)
    )
    return (rows or one) and exact and fits and scale.dtype is torch.float32 and 0 < values.numel() < 2**31


def straight_through(
    values: Tensor, scale: Tensor, bottom: float | Tensor, steps: float, margins: tuple[float, float]
) -> Tensor:
    """`values` on the grid; the gradient passes less than `margins` beyond its ends, in steps."""
    found = _StraightThrough.apply(values, scale, bottom, steps, margins)  # type: ignore[no-untyped-call]
    return cast(Tensor, found)


def learned_step(
    values: Tensor, scale: Tensor, bottom: float | Tensor, steps: float, factor: float, offset: Tensor | None = None
) -> Tensor:
    """`values` on the grid of a learned `scale`, and a learned `offset` if there is one."""
    found = _LearnedStep.apply(values, scale, offset, bottom, steps, factor)  # type: ignore[no-untyped-call]
    return cast(Tensor, found)


def learned_clip(
    values: Tensor, low: Tensor, high: Tensor, scale: Tensor, bottom: float | Tensor, steps: float
) -> Tensor:
    """`values` on a grid between learned ends, numbers both."""
    return cast(Tensor, _LearnedClip.apply(values, low, high, scale, bottom, steps))  # type: ignore[no-untyped-call]


class _Launch(NamedTuple):
    """How a tensor is cut up: `rows` of one scale each, in `blocks` of `BLOCK` elements."""

    rows: int
    blocks: int
    arguments: dict[str, Any]

    @property
    def grid(self) -> tuple[int]:
        return (self.rows * self.blocks,)

    def sums(self, like: Tensor) -> Tensor:
        return torch.empty(self.rows, self.blocks, dtype=torch.float32, device=like.device)


def _launch(values: Tensor, scale: Tensor, bottom: float | Tensor, steps: float) -> _Launch:
    rows = scale.numel()
    columns = values.numel() // rows
    block = min(_BLOCK, max(16, power_of_two(columns)))
    scale = scale.contiguous()
    moving = bottom.contiguous() if isinstance(bottom, Tensor) else None
    arguments = {
        "scale_ptr": scale,
        "bottom_ptr": scale if moving is None else moving,
        "bottom": 0.0 if moving is not None else float(bottom),
        "steps": float(steps),
        "columns": columns,
        "blocks": -(-columns // block),
        "bottom_stride": int(moving is not None and moving.numel() > 1),
        "MOVING": moving is not None,
        "NARROW": values.dtype is torch.bfloat16,
        "BLOCK": block,
        "num_warps": 4 if block > 512 else 1,
        **EXACT,
    }
    return _Launch(rows, arguments["blocks"], arguments)


def _rounded(values: Tensor, scale: Tensor, bottom: float | Tensor, steps: float) -> Tensor:
    launch, outputs = _launch(values, scale, bottom, steps), torch.empty_like(values)
    round_to_grid[launch.grid](values, outputs, **launch.arguments)
    return outputs


def _alike(gradient: Tensor, values: Tensor) -> Tensor:
    """`gradient` in the layout of `values`."""
    return gradient if gradient.stride() == values.stride() else torch.empty_like(values).copy_(gradient)


def _keep(ctx: Any, bottom: float | Tensor, steps: float, *tensors: Tensor) -> None:
    ctx.save_for_backward(*tensors, bottom if isinstance(bottom, Tensor) else None)
    ctx.bottom, ctx.steps = bottom if not isinstance(bottom, Tensor) else None, steps


def _kept(ctx: Any) -> tuple[Any, ...]:
    """The tensors that were kept, and the bottom."""
    *tensors, bottom = ctx.saved_tensors
    return *tensors, ctx.bottom if bottom is None else bottom


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, scale: Tensor, bottom: float | Tensor, steps: float, margins: tuple[float, float]
    ) -> Tensor:
        _keep(ctx, bottom, steps, values, scale)
        ctx.margins = margins
        return _rounded(values, scale, bottom, steps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        values, scale, bottom = _kept(ctx)
        launch, passed = _launch(values, scale, bottom, ctx.steps), torch.empty_like(values)
        given = (_alike(gradient, values), values, passed, passed, passed, *ctx.margins)
        step_backward[launch.grid](*given, **launch.arguments, SUMS=False, OFFSET=False)
        return passed, None, None, None, None


class _LearnedStep(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        scale: Tensor,
        offset: Tensor | None,
        bottom: float | Tensor,
        steps: float,
        factor: float,
    ) -> Tensor:
        _keep(ctx, bottom, steps, values, scale)
        ctx.factor, ctx.learns_offset = factor, offset is not None
        return _rounded(values, scale, bottom, steps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        values, scale, bottom = _kept(ctx)
        launch, passed = _launch(values, scale, bottom, ctx.steps), torch.empty_like(values)
        step = launch.sums(values)
        beyond = launch.sums(values) if ctx.learns_offset else step
        given = (_alike(gradient, values), values, passed, step, beyond, 0.0, 0.0)
        step_backward[launch.grid](*given, **launch.arguments, SUMS=True, OFFSET=ctx.learns_offset)
        moved = beyond.sum() * ctx.factor if ctx.learns_offset else None
        return passed, step.sum(1).reshape(scale.shape) * ctx.factor, moved, None, None, None


class _LearnedClip(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, low: Tensor, high: Tensor, scale: Tensor, bottom: float | Tensor, steps: float
    ) -> Tensor:
        ctx.save_for_backward(values, low, high)
        return _rounded(values, scale, bottom, steps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        values, low, high = ctx.saved_tensors
        learns = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        launch, passed = _launch(values, low, 0.0, 0.0), torch.empty_like(values)
        lowered, raised = (launch.sums(values) if learns else passed for _ in range(2))
        names = ("columns", "NARROW", "BLOCK", "num_warps", *EXACT)
        given = (_alike(gradient, values), values, low, high, passed, lowered, raised)
        clip_backward[launch.grid](*given, **{name: launch.arguments[name] for name in names}, SUMS=learns)
        ends = (lowered.sum().reshape(low.shape), raised.sum().reshape(high.shape)) if learns else (None, None)
        return passed, *ends, None, None, None
