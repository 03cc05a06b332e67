"""Ops of the hub form that are qsweep's own: real weights from integers that integer kernels do not take."""

from __future__ import annotations

import torch
import torch.ao.quantization.fx._decomposed  # registers quantized_decomposed
from torch import Tensor


@torch.library.custom_op("qsweep::dequantize_groups", mutates_args=())
def dequantize_groups(integers: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
    """(q - zero_point) * scale; each channel of `integers` (C, ...) in G equal parts, `scale`, `zero_point` (C, G)."""
    parts = integers.reshape(*scale.shape, -1).float()
    return ((parts - zero_point.unsqueeze(-1)) * scale.unsqueeze(-1)).reshape(integers.shape)


@torch.library.custom_op("qsweep::look_up", mutates_args=())
def look_up(integers: Tensor, table: Tensor, bits: int) -> Tensor:
    """table[t, q + 2^(bits-1)]; `table` (T, 2^bits) has one row for `integers` (C, ...) or one for each channel."""
    places = integers.long().flatten(1) + (1 << (bits - 1))
    return table.expand(len(integers), -1).gather(1, places).reshape(integers.shape)


DEQUANTIZE_WEIGHT = torch.ops.quantized_decomposed.dequantize_per_channel.default
DEQUANTIZE_GROUPS = torch.ops.qsweep.dequantize_groups.default
LOOK_UP = torch.ops.qsweep.look_up.default
STORED = {DEQUANTIZE_WEIGHT, DEQUANTIZE_GROUPS, LOOK_UP}
"""Ops that give a layer its real weights from the integers that are their argument 0."""
