"""Layer norm, with the sum before it and the grid after it in one pass over the memory. Float arithmetic: not exact."""

from __future__ import annotations

import triton
from torch import Tensor

from qsweep.cuda._launch import EXACT, check_offsets, grid_arguments, power_of_two
from qsweep.cuda._norms import normalize_rows
from qsweep.cuda.arithmetic import Operand, Output, Total
from qsweep.cuda.plan import WIDEST_NORM
from qsweep.cuda.pointwise import inverse_of

_BLOCK = 4096


def layer_norm(
    given: Tensor | tuple[Operand, ...],
    weight: Tensor,
    bias: Tensor,
    epsilon: float,
    scale: float,
    output: Output,
    out: Tensor,
    invalid: Tensor,
    *,
    total: Total | None = None,
) -> Tensor:
    """Write the layer norm of rows (M, K) into `out`, int8 (M, K), onto the grid of `scale` and `output`; return it.

    `given`: float rows, or one or two tensors of integers whose values (multipliers are their scales) are added first.
    Any row strides; K at most `WIDEST_NORM`. `weight`, `bias`: float32 (K,). `total`: of two tensors alone. A NaN sets
    `invalid` as in `qsweep.cuda.pointwise.quantize`.
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
    down = max(1, _BLOCK // across)
    normalize_rows[(triton.cdiv(count, down),)](
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
        inverse_of(scale),
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
        **EXACT,
    )
    return out
