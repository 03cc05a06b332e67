"""What the host functions share: arguments of the kernels' ends, default blocks, and bounds of what they take."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from qsweep.cuda.arithmetic import Output, Requantize, Residual, Tile
from qsweep.errors import Refused

if os.environ.get("TRITON_INTERPRET") == "1":
    from triton.runtime import interpreter

    # it would compute whether integers overflow, in a third of its time, and tell nobody unless it debugs
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)

EXACT: dict[str, Any] = {"enable_fp_fusion": False}
"""Launch option of every kernel: fused multiply-adds would round once where the contract rounds twice."""


def grid_arguments(output: Output | None, bounds: tuple[float, float] = (-torch.inf, torch.inf)) -> dict[str, Any]:
    """`y_zero`, `low`, `high` of `write`: relative to the zero point for integers, in real units for floats, None for
    floats without bounds."""
    if output is None:
        low, high = bounds if bounds != (-torch.inf, torch.inf) else (None, None)
        return {"y_zero": 0, "low": low, "high": high}
    low, high = output.low - output.zero_point, output.high - output.zero_point
    return {"y_zero": output.zero_point, "low": float(low), "high": float(high)}


def check_result(out: Tensor, output: Output | None) -> None:
    """Asserts that `out` holds what a kernel writes onto `output`: int8, or floating point of any width for None."""
    assert out.is_floating_point() if output is None else out.dtype == torch.int8


def finish_arguments(requantize: Requantize, residual: Residual | None, out: Tensor) -> dict[str, Any]:
    """What `finish` takes, for `out` (N, OH, OW, OC)."""
    check_result(out, requantize.output)
    assert out.stride(3) == 1 or out.shape[3] == 1
    given = {
        "y_ptr": out,
        "bias_ptr": requantize.bias,
        "multiplier_ptr": requantize.multiplier,
        "table_ptr": out if requantize.table is None else requantize.table,
        "TABLE": requantize.table is not None,
        **grid_arguments(requantize.output, requantize.bounds),
        **dict(zip(("y_n", "y_h", "y_w"), out.stride(), strict=False)),
        "OH": out.shape[1],
        "OW": out.shape[2],
        "RESIDUAL": residual is not None,
    }
    return given | _residual_arguments(residual, out)


def _residual_arguments(residual: Residual | None, out: Tensor) -> dict[str, Any]:
    if residual is None:
        nothing = dict.fromkeys(("r_n", "r_h", "r_w", "r_zero"), 0)
        return {"r_ptr": out} | nothing | dict.fromkeys(("r_multiplier", "own_low", "own_high", "own_multiplier"), 0.0)
    assert residual.values.shape == out.shape
    assert residual.values.dtype == torch.int8
    own = residual.own
    return {
        "r_ptr": residual.values,
        **dict(zip(("r_n", "r_h", "r_w"), residual.values.stride(), strict=False)),
        "r_zero": residual.zero_point,
        "r_multiplier": residual.multiplier,
        "own_low": float(own.low - own.zero_point),
        "own_high": float(own.high - own.zero_point),
        "own_multiplier": residual.own_multiplier,
    }


def default_tile(rows: int, columns: int, depth: int, channels: int) -> Tile:
    """Blocks that run anywhere, for `rows` x `columns` sums of `depth` products, `channels` of them side by side."""
    across = min(128, max(16, power_of_two(columns)))
    down = 128 if rows * columns >= 128 * across * 132 else 64
    deep = 128 if channels % 128 == 0 else 64
    blocks = -(-rows // down) * -(-columns // across)
    split = max(1, min(8, 132 // blocks, -(-depth // deep) // 4))
    return Tile(down, across, deep, warps=8 if down * across >= 128 * 128 else 4, split=split)


def power_of_two(value: int) -> int:
    """The smallest power of two that is not under `value`."""
    return 1 << (value - 1).bit_length()


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def check_offsets(*tensors: Tensor) -> None:
    """Kernels count elements in 32 bits. Raises `Refused` for tensors that are larger."""
    for tensor in tensors:
        if sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) >= 2**31:
            raise Refused(f"a tensor of a kernel: must have fewer than 2^31 elements (got {tuple(tensor.shape)})")
