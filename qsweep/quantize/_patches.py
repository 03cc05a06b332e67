"""Convolutions and linears as products of matrices."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from qsweep.hub.kinds import LINEARS
from qsweep.hub.nodes import arguments
from qsweep.quantize._arithmetic import WeightLevels
from qsweep.quantize._layerwise import Layer

_BYTES = 128 * 2**20
_MOST_ROWS = 1 << 16
_SAMPLES = 64


def as_rows(weight: Tensor, groups: int) -> Tensor:
    """(C, ...) as (g, C/g, K), one matrix for each group of a convolution."""
    return weight.reshape(groups, len(weight) // groups, -1)


def per_weight(values: Tensor, weight: Tensor) -> Tensor:
    """`values` (C, G) of `WeightLevels`, one for each of the K weights of a channel: (C, K)."""
    return values.repeat_interleave(weight[0].numel() // values.shape[1], 1)


def groups_of(node: fx.Node) -> int:
    """Groups of a convolution; a linear has one."""
    return 1 if node.target in LINEARS else int(arguments(node)["groups"])


def patches(layer: Layer, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(g, R, K) inputs of R outputs, and (g, R, C/g) the float model's values there, before the rectifier.

    All of them, or as many as fit 128 MiB, the same number of each sample, their places drawn by `generator`; in an
    order drawn by it too.
    """
    groups = groups_of(layer.node)
    width = layer.weight[0].numel()
    rows = max(width, min(_MOST_ROWS, _BYTES // (4 * width * groups)))
    if layer.node.target in LINEARS:
        inputs, targets = layer.inputs.reshape(-1, width), layer.target.reshape(-1, len(layer.weight))
    else:
        parts = zip(*_windows(layer, rows, generator), strict=True)
        inputs, targets = (torch.cat(part) for part in parts)
    drawn = torch.randperm(len(inputs), generator=generator)[:rows]
    return _by_groups(inputs[drawn], groups), _by_groups(targets[drawn], groups)


def _by_groups(values: Tensor, groups: int) -> Tensor:
    return values.reshape(len(values), groups, -1).transpose(0, 1).contiguous()


def _windows(layer: Layer, rows: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """(r, g * K) what some windows of a convolution see and (r, C) their targets, for some samples at a time."""
    given, dims = arguments(layer.node), layer.weight.dim() - 2
    inputs, targets = layer.inputs, layer.target.flatten(2)
    stride, dilation, padding = (_each(given[name], dims) for name in ("stride", "dilation", "padding"))
    padded = F.pad(inputs, [size for size in reversed(padding) for _ in range(2)])
    starts = _places(layer.target.shape[2:], stride, padded.shape[2:])
    offsets = _places(layer.weight.shape[2:], dilation, padded.shape[2:])
    kept = min(len(starts), -(-rows // len(inputs)))
    for part, values in zip(*(torch.split(values, _SAMPLES) for values in (padded.flatten(2), targets)), strict=True):
        count, channels = part.shape[:2]
        drawn = torch.arange(kept).expand(count, -1)
        if kept < len(starts):
            drawn = torch.randint(len(starts), (count, kept), generator=generator)
        seen = (starts[drawn].unsqueeze(2) + offsets).flatten(1).unsqueeze(1).expand(-1, channels, -1)
        windows = part.gather(2, seen).reshape(count, channels, kept, -1).transpose(1, 2)
        outputs = values.gather(2, drawn.unsqueeze(1).expand(-1, values.shape[1], -1)).transpose(1, 2)
        yield windows.reshape(count * kept, -1), outputs.reshape(count * kept, -1)


def _places(shape: torch.Size, step: list[int], size: torch.Size) -> Tensor:
    """Flat indices, into a tensor of `size`, of a lattice of `shape` that takes every `step`-th place."""
    places = torch.zeros(1, dtype=torch.long)
    for length, every, extent in zip(shape, step, size, strict=True):
        places = (places.unsqueeze(1) * extent + torch.arange(length) * every).flatten()
    return places


def _each(value: int | list[int], dims: int) -> list[int]:
    """A setting of a convolution by dimension."""
    values = [value] if isinstance(value, int) else list(value)
    return values if len(values) == dims else values * dims


def flat_levels(levels: WeightLevels, weight: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each weight, (g, C/g, K)."""
    scale, zero_point = (per_weight(values, weight) for values in (levels.scale, levels.zero_point))
    return as_rows(scale, groups), as_rows(zero_point, groups)
