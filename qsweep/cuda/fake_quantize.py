"""Fake quantization in one pass forward and one back: see `qsweep.quantize._fake`, whose values these are, to the bit.

Values are dense in memory; gradients have their layout and type. Sums are taken block by block and then over the
blocks, in an order that depends on shapes alone: the same bits each time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from qsweep.cuda import _fake_quantize as kernels
from qsweep.cuda._launch import EXACT, power_of_two

_BLOCK = 2048
"""Elements of a program: 16 of each of its threads."""


def takes(values: Tensor) -> bool:
    """Whether the kernels are for so many values."""
    return values.numel() < 2**31


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


def on_grid(values: Tensor, scale: Tensor, bottom: float | Tensor, steps: float) -> Tensor:
    """`values` on the grid."""
    launch, outputs = _launch(values, scale, bottom, steps), torch.empty_like(values)
    kernels.round_to_grid[launch.grid](values, outputs, **launch.arguments)
    return outputs


def step_backward(
    gradient: Tensor,
    values: Tensor,
    scale: Tensor,
    bottom: float | Tensor,
    steps: float,
    margins: tuple[float, float],
    *,
    sums: bool,
    offset: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradient less than `margins` beyond the ends, in steps; with `sums`, what the step's gradient is, of the
    shape of `scale`; with a learned `offset`, the sum of what does not pass."""
    launch, passed = _launch(values, scale, bottom, steps), torch.empty_like(values)
    step, beyond = (launch.sums(values) if wanted else passed for wanted in (sums, offset))
    kernels.step_backward[launch.grid](
        gradient, values, passed, step, beyond, *margins, **launch.arguments, SUMS=sums, OFFSET=offset
    )
    return passed, step.sum(1).reshape(scale.shape) if sums else None, beyond.sum() if offset else None


def clip_backward(
    gradient: Tensor, values: Tensor, low: Tensor, high: Tensor, *, sums: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradient between `low` and `high`, numbers both; with `sums`, those of `low` and of `high`."""
    launch, passed = _launch(values, low, 0.0, 0.0), torch.empty_like(values)
    lowered, raised = (launch.sums(values) if sums else passed for _ in range(2))
    names = ("columns", "NARROW", "BLOCK", "num_warps", *EXACT)
    given = {name: launch.arguments[name] for name in names}
    kernels.clip_backward[launch.grid](gradient, values, low, high, passed, lowered, raised, **given, SUMS=sums)
    if not sums:
        return passed, None, None
    return passed, lowered.sum().reshape(low.shape), raised.sum().reshape(high.shape)
