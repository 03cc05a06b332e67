"""Ops of the hub form that are qsweep's own.

Real weights from integers that integer kernels do not take, activations on grids that each batch or each row sets anew,
and a function of one number that PyTorch has no op for.
"""

from __future__ import annotations

import torch
import torch.ao.quantization.fx._decomposed  # registers quantized_decomposed
from torch import Tensor

LEAST_SCALE = torch.finfo(torch.float32).tiny * 2**24
"""Scales below it are those of nothing but zeros: their reciprocals would leave float32."""


@torch.library.custom_op("qsweep::dequantize_groups", mutates_args=())
def dequantize_groups(integers: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
    """(q - zero_point) * scale, float32; each channel of `integers` (C, ...) in G equal parts, `scale` and `zero_point`
    (C, G)."""
    parts = integers.reshape(*scale.shape, -1).float()
    return ((parts - zero_point.unsqueeze(-1)) * scale.float().unsqueeze(-1)).reshape(integers.shape)


@torch.library.custom_op("qsweep::look_up", mutates_args=())
def look_up(integers: Tensor, table: Tensor, scale: Tensor, bits: int) -> Tensor:
    """table[c, q + 2^(bits-1)] * scale[c], float32; `table` (C, 2^bits), `scale` (C,) for `integers` (C, ...), or
    either with one row for all channels."""
    places = integers.long().flatten(1) + (1 << (bits - 1))
    found = table.float().expand(len(integers), -1).gather(1, places)
    return (found * scale.unsqueeze(1)).reshape(integers.shape)


def dynamic_fake_quantize(values: Tensor, low: int, high: int, symmetric: bool) -> Tensor:
    """`values` on the grid, integers from `low` to `high`, that covers their own range and has 0 on it.

    `symmetric`: zero point 0 and the last level on the largest magnitude; else fitted to both ends. Values that are all
    0 stay so; NaN or infinity among them makes all of them so. Gradients pass inside the grid.
    """
    smallest, largest = values.detach().aminmax()
    smallest, largest = smallest.clamp(max=0.0), largest.clamp(min=0.0)
    scale = torch.maximum(-smallest, largest) / high if symmetric else (largest - smallest) / (high - low)
    scale = torch.where(scale < LEAST_SCALE, torch.ones_like(scale), scale)
    fitted = (low - (smallest / scale).round()).clamp(low, high)
    zero_point = torch.zeros_like(fitted) if symmetric else fitted
    return torch.fake_quantize_per_tensor_affine(values, scale, zero_point.to(torch.int32), low, high)


@torch.library.custom_op("qsweep::quantize_dynamic", mutates_args=())
def quantize_dynamic(values: Tensor, low: int, high: int, symmetric: bool) -> Tensor:
    """See `dynamic_fake_quantize`."""
    return dynamic_fake_quantize(values, low, high, symmetric)


def row_scale(values: Tensor, high: int) -> Tensor:
    """(..., 1): max|row| / `high` of each row of `values` (..., K); 1 under `LEAST_SCALE`, NaN if any is not finite."""
    scale = values.detach().abs().amax(-1, keepdim=True) / high
    scale = torch.where(scale < LEAST_SCALE, torch.ones_like(scale), scale)
    return torch.where(scale.isfinite(), scale, torch.nan)


def row_fake_quantize(values: Tensor, low: int, high: int) -> Tensor:
    """`values` (..., K), each row on a symmetric grid of its own, integers from `low` to `high`.

    q = clamp(round(row * (1 / scale))), scale as `row_scale` has it: rows of scales under `LEAST_SCALE` become 0, and
    NaN or infinity in a row makes all of it NaN. Gradients pass inside the grid.
    """
    rows = values.reshape(-1, values.shape[-1])
    scale = row_scale(rows, high).squeeze(1)
    zero_points = torch.zeros_like(scale, dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(rows, scale, zero_points, 0, low, high).reshape(values.shape)


@torch.library.custom_op("qsweep::quantize_rows", mutates_args=())
def quantize_rows(values: Tensor, low: int, high: int) -> Tensor:
    """See `row_fake_quantize`."""
    return row_fake_quantize(values, low, high)


quantize_rows.register_fake(lambda values, low, high: torch.empty_like(values))


torch.library.define("qsweep::quick_gelu", "(Tensor values) -> Tensor")


@torch.library.impl("qsweep::quick_gelu", "CompositeImplicitAutograd")
def quick_gelu(values: Tensor) -> Tensor:
    """x * sigmoid(1.702 x) (Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016, section 2), as CLIP has it."""
    return values * torch.sigmoid(1.702 * values)


DEQUANTIZE_WEIGHT = torch.ops.quantized_decomposed.dequantize_per_channel.default
DEQUANTIZE_GROUPS = torch.ops.qsweep.dequantize_groups.default
LOOK_UP = torch.ops.qsweep.look_up.default
QUANTIZE_DYNAMIC = torch.ops.qsweep.quantize_dynamic.default
QUANTIZE_ROWS = torch.ops.qsweep.quantize_rows.default
QUICK_GELU = torch.ops.qsweep.quick_gelu.default
STORED = {DEQUANTIZE_WEIGHT, DEQUANTIZE_GROUPS, LOOK_UP}
"""Ops that give a layer its real weights from the integers that are their argument 0."""
