"""Uniform quantization as arithmetic on tensors (DESIGN: the integer contract). Scales are float32 numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qsweep.hub.form import Grid
from qsweep.hub.ops import LEAST_SCALE
from qsweep.quantize.base import Scheme

EMPTY_SCALE = 2.0**-8
"""Of activations that are all 0. The biases behind them are multiples of it: it must not be large."""


def activation_grid(low: float, high: float, bits: int, scheme: Scheme, *, nonnegative: bool) -> Grid:
    """The grid of `bits` bits, in int8, that covers [low, high] and has 0 on it.

    symmetric: zero point in the middle, or at the lower end for a `nonnegative` tensor; asymmetric: fitted. A range
    that holds nothing but 0 gets `EMPTY_SCALE`.
    """
    bottom, top = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    low, high = min(low, 0.0), max(high, 0.0)
    if nonnegative:
        low = 0.0
    elif scheme == "symmetric":
        high = max(-low, high)
        low = -high * (top + 1) / top
    scale = torch.tensor((high - low) / (top - bottom), dtype=torch.float32)
    scale = torch.where(scale < LEAST_SCALE, EMPTY_SCALE, scale)
    centred = scheme == "symmetric" and not nonnegative
    zero_point = 0 if centred else bottom - round(low / scale.item())
    return Grid(scale.item(), max(bottom, min(top, zero_point)), bottom, top)


@dataclass(frozen=True)
class WeightLevels:
    """The levels of weights (C, ...): `scale` and `zero_point` (C, G), one for each of G equal parts of a channel.

    Scales of several groups are those of `in_half`: what is fitted, simulated and stored are the same numbers.
    """

    scale: Tensor
    zero_point: Tensor
    low: int
    high: int

    def __post_init__(self) -> None:
        if self.scale.shape[1] > 1:
            object.__setattr__(self, "scale", torch.ops.qsweep.in_half(self.scale, self.high - self.low))

    @property
    def symmetric_channels(self) -> bool:
        """Whether integer kernels take them: one scale a channel, zero in the middle."""
        return self.scale.shape[1] == 1 and self.low == -self.high

    def integers(self, weight: Tensor) -> Tensor:
        """Nearest levels (half to even), float32, of the shape of `weight`.

        Multiplies by 1/scale, as `torch.fake_quantize_per_channel_affine` does: what was trained is what is stored.
        """
        parts = weight.reshape(*self.scale.shape, -1) * (1 / self.scale).unsqueeze(-1)
        return (parts.round() + self.zero_point.unsqueeze(-1)).clamp(self.low, self.high).reshape(weight.shape)

    def real(self, integers: Tensor) -> Tensor:
        parts = integers.reshape(*self.scale.shape, -1) - self.zero_point.unsqueeze(-1)
        return (parts * self.scale.unsqueeze(-1)).reshape(integers.shape)


torch.library.define("qsweep::in_half", "(Tensor scale, int steps) -> Tensor")


@torch.library.impl("qsweep::in_half", "CompositeExplicitAutograd")
def in_half(scale: Tensor, steps: int) -> Tensor:
    """float32: every `scale` rounded to a 16-bit float where that makes a range of so many `steps` no more than half a
    step longer or shorter, else as it is. (An op, as Inductor leaves out a conversion to fewer bits and back.)

    So rounded are, up to 8 bits, all from 2^-16 to 65504; with fewer bits smaller ones, too: from 2^-20 at 4.
    """
    half = scale.half().float()
    return torch.where((half - scale).abs() * steps <= scale / 2, half, scale)


def weight_levels(
    weight: Tensor,
    bits: int,
    *,
    scheme: Scheme = "symmetric",
    per_tensor: bool = False,
    group_size: int | None = None,
    mse: bool = False,
    smallest: Tensor | None = None,
) -> WeightLevels:
    """Levels fitted to `weight` (C, ...): symmetric in [-(2^(b-1)-1), 2^(b-1)-1], asymmetric in [-2^(b-1), 2^(b-1)-1].

    `mse`: of 50 shares of the largest weight, the end of the range that rounds with the least squared error. `smallest`
    (C,): scales are no smaller.
    """
    groups = weight[0].numel() // group_size if group_size and weight[0].numel() % group_size == 0 else 1
    parts = weight.detach().reshape(1, 1, -1) if per_tensor else weight.detach().reshape(len(weight), groups, -1)
    levels = _fitted(parts, bits, scheme, 1.0)
    if mse:
        levels = _least_error(parts, bits, scheme, levels)
    scale, zero_point = (value.expand(len(weight), -1) for value in (levels.scale, levels.zero_point))
    if smallest is not None:
        scale = torch.maximum(scale, smallest.unsqueeze(1))
    return replace(levels, scale=scale.contiguous(), zero_point=zero_point.contiguous())


def _fitted(parts: Tensor, bits: int, scheme: Scheme, share: float) -> WeightLevels:
    """Levels of `parts` (C, G, n) for `share` of their range.

    A part of zeros has no scale of its own: it gets 2^-12 of the largest one, so that its bias keeps its precision. So
    do numbers next to the least ones that float32 has. Groups, behind which no bias is rounded, get the largest one,
    which 16 bits hold sooner.
    """
    top = (1 << (bits - 1)) - 1
    if scheme == "symmetric":
        low, scale = -top, share * parts.abs().amax(2) / top
    else:
        low, ends = -top - 1, (parts.amin(2).clamp(max=0), parts.amax(2).clamp(min=0))
        scale = share * (ends[1] - ends[0]) / (top - low)
    largest = scale.max()
    empty = largest if parts.shape[1] > 1 else largest * 2.0**-12
    floor = torch.where(largest > LEAST_SCALE, empty, torch.full_like(largest, 2.0**-7))
    scale = torch.where(scale > LEAST_SCALE, scale, floor)
    levels = WeightLevels(scale, torch.zeros_like(scale), low, top)
    if scheme == "symmetric":
        return levels
    return replace(levels, zero_point=(low - (share * ends[0] / levels.scale).round()).clamp(low, top))


def _least_error(parts: Tensor, bits: int, scheme: Scheme, best: WeightLevels) -> WeightLevels:
    error = _error(parts, best)
    for step in range(1, 50):
        tried = _fitted(parts, bits, scheme, 1 - step / 60)
        found = _error(parts, tried)
        scale = torch.where(found < error, tried.scale, best.scale)
        zero_point = torch.where(found < error, tried.zero_point, best.zero_point)
        best, error = replace(best, scale=scale, zero_point=zero_point), torch.minimum(found, error)
    return best


def _error(parts: Tensor, levels: WeightLevels) -> Tensor:
    return (levels.real(levels.integers(parts)) - parts).square().sum(2)
