"""Layer norm, with the sum before it and the grid after it in one pass over the memory. Float arithmetic: not exact."""

from __future__ import annotations

import triton
from torch import Tensor

from qsweep.cuda._launch import EXACT, check_offsets, grid_arguments, power_of_two
from qsweep.cuda._norms import normalize_rows
from qsweep.cuda.arithmetic import Operand, Output, Total
from qsweep.cuda.plan import WIDEST_NORM

_WARPS, _LEAST, _MOST = 4, 2048, 4096
"""Rows of a block are at least as many as its warps, so that each stays within one, and hold so many numbers."""
_TURNS, _MANY = 8, 8192
"""Blocks that follow each other in a program where there are so many rows."""


def layer_norm(
    given: Tensor | tuple[Operand, ...],
    weight: Tensor,
    bias: Tensor,
    epsilon: float,
    output: Output,
    out: Tensor,
    invalid: Tensor,
    *,
    total: Total | None = None,
) -> Tensor:
    """Write the layer norm of rows (M, K) into `out`, int8 (M, K), onto the grid `output`; return it.

    `given`: float rows, or one or two tensors of integers whose values (multipliers are their scales) are added first.
    Any row strides; K at most `WIDEST_NORM`. `weight`, `bias`: float32 (K,), finite, in units of the grid's scale.
    `total`: of two tensors alone. A NaN, or an infinity among float rows, sets `invalid` as in
    `qsweep.cuda.pointwise.quantize`.
    """
    sides = (Operand(given, 0, 1.0),) if isinstance(given, Tensor) else given
    left, right = sides[0], sides[-1]
    count, width = out.shape
    assert width <= WIDEST_NORM and out.stride(1) == 1
    assert all(side.values.shape == out.shape and side.values.stride(1) == 1 for side in sides)
    written = total or Total(0.0, 0.0, output, out)
    assert written.out.shape == out.shape and written.out.stride(1) == 1
    check_offsets(left.values, right.values, out, written.out)
    across = power_of_two(width)
    down = max(1, min(_MOST // across, max(_WARPS, _LEAST // across)))
    turns = _TURNS if count >= _MANY else 1
    normalize_rows[(triton.cdiv(count, down * turns),)](
        left.values,
        right.values,
        weight,
        bias,
        out,
        written.out,
        invalid,
        left.zero_point,
        left.multiplier,
        right.zero_point,
        right.multiplier,
        **grid_arguments(output),
        epsilon=epsilon,
        share=1.0 / width,
        left_multiplier=written.left,
        right_multiplier=written.right,
        **{f"t_{name.removeprefix('y_')}": value for name, value in grid_arguments(written.output).items()},
        R=count,
        D=width,
        l_row=left.values.stride(0),
        r_row=right.values.stride(0),
        y_row=out.stride(0),
        t_row=written.out.stride(0),
        BOTH=len(sides) == 2,
        TOTAL=total is not None,
        BR=down,
        BD=across,
        TURNS=turns,
        num_warps=_WARPS,
        **EXACT,
    )
    return out
