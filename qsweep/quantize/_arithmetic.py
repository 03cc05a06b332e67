"""Uniform quantization as arithmetic on tensors (DESIGN: the integer contract). Scales are float32 numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from qsweep.hub.form import Grid
from qsweep.quantize.base import Scheme


def activation_grid(low: float, high: float, bits: int, scheme: Scheme, *, nonnegative: bool) -> Grid:
    """The grid of `bits` bits, in int8, that covers [low, high] and has 0 on it.

    symmetric: zero point in the middle, or at the lower end for a `nonnegative` tensor; asymmetric: fitted. A range
    that holds nothing but 0 gets scale 1.
    """
    bottom, top = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    low, high = min(low, 0.0), max(high, 0.0)
    if nonnegative:
        low = 0.0
    elif scheme == "symmetric":
        high = max(-low, high)
        low = -high * (top + 1) / top
    scale = torch.tensor((high - low) / (top - bottom), dtype=torch.float32)
    scale = torch.where(scale < torch.finfo(torch.float32).tiny * 2**24, torch.ones(()), scale)
    centred = scheme == "symmetric" and not nonnegative
    zero_point = 0 if centred else bottom - round(low / scale.item())
    return Grid(scale.item(), max(bottom, min(top, zero_point)), bottom, top)


def weight_scale(weight: Tensor, bits: int, smallest: Tensor | None = None) -> Tensor:
    """(C,) float32 scales that put the largest absolute value of each output channel on the last level.

    A channel of zeros has no scale of its own: it gets 2^-12 of the largest one, so that its bias keeps its precision.
    """
    scale = weight.detach().abs().flatten(1).amax(1) / ((1 << (bits - 1)) - 1)
    largest = scale.max()
    floor = torch.where(largest > 0, largest * 2.0**-12, torch.full((), 2.0**-7))
    scale = torch.maximum(scale, floor)
    return scale if smallest is None else torch.maximum(scale, smallest)


def quantize_weight(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """int8 levels in [-(2^(bits-1)-1), 2^(bits-1)-1], rounded half to even; `scale` (C,) over the first dimension.

    Multiplies by 1/scale, as `torch.fake_quantize_per_channel_affine` does: what was trained is what is stored.
    """
    top = (1 << (bits - 1)) - 1
    inverse = (1 / scale).reshape(-1, *[1] * (weight.dim() - 1))
    return (weight * inverse).round().clamp(-top, top).to(torch.int8)
