"""What a kernel must know of the numbers: grids, multipliers, residuals, block shapes. Plain data, no Triton."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class Output(NamedTuple):
    """The grid that integers are written on: y = round(clamp(v, low - zero_point, high - zero_point)) + zero_point.

    `low` and `high` lie in [-128, 127] and already include a ReLU or ReLU6 that follows.
    """

    zero_point: int
    low: int = -128
    high: int = 127


@dataclass(frozen=True)
class Requantize:
    """From exact sums to a result: v = f32(sum + bias[c]) * multiplier[c], then onto `output`.

    Sums of x * w and of (x - z_x) * w must both stay below 2^31, those of a part of the products too: the matrix units
    of sm_80 saturate. `qsweep.hub.accumulators` refuses weights that could reach it.
    """

    bias: Tensor
    """int32 (OC,): the layer's integer bias - z_x * sum(w[c])."""
    multiplier: Tensor
    """float32 (OC,): f32(f32(s_x * s_w[c]) / s_y); where `output` is None the step f32(s_x * s_w[c])."""
    output: Output | None
    """None: float32 results, v itself."""
    bounds: tuple[float, float] = (-math.inf, math.inf)
    """Of float32 results: what a ReLU or ReLU6 that follows leaves."""
    table: Tensor | None = None
    """int8 (256,): what is written for each integer on `output`, from -128 on; None: these themselves."""


@dataclass(frozen=True)
class Residual:
    """A tensor that is added to a layer's result after that was rounded onto its own grid.

    a = round(clamp(v, own.low - own.zero_point, own.high - own.zero_point)), v from the multiplier s_x * s_w / s_c;
    v' = a * own_multiplier + (values - zero_point) * multiplier: two products and one sum, each rounded to float32.
    """

    values: Tensor
    """int8, shaped like the layer's output, channel stride 1."""
    zero_point: int
    multiplier: float
    """f32(s_r / s_y)."""
    own: Output
    """The grid of the layer's own result."""
    own_multiplier: float
    """f32(s_c / s_y)."""


@dataclass(frozen=True)
class Operand:
    """One side of a sum of integer tensors: (values - zero_point) * multiplier."""

    values: Tensor
    """int8."""
    zero_point: int
    multiplier: float
    """f32(scale / s_y)."""


@dataclass(frozen=True)
class Tile:
    """Block shape of a product: `rows` (pixels or tokens) x `columns` (output channels), `depth` products a step.

    All three are powers of two, `rows` and `columns` at least 16, `depth` at least 32.
    """

    rows: int
    columns: int
    depth: int
    warps: int = 4
    stages: int = 3
    split: int = 1
    """Parts that the sum is cut into and that run side by side; exact, as the parts are integers."""


@dataclass(frozen=True)
class Total:
    """Where the sum of two sides goes, too: as `qsweep.cuda.pointwise.add` writes it."""

    left: float
    """What an integer of that side counts on the sum's grid."""
    right: float
    output: Output
    out: Tensor
    """int8 (M, K)."""
