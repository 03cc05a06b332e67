"""Ranking the channels of a network, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from qsweep.errors import TaskFailure
from qsweep.hub.coupling import Coupling, Width
from qsweep.hub.narrow import coupling_of, loose
from qsweep.weights import check_finite


@torch.no_grad()
def zero_channels(model: nn.Module, example: Tensor, sparsity: float, multiple: int) -> Coupling:
    """Set the `sparsity` least important channels of every layer to zero, in place: weights, biases and norms. Returns
    which channels go together.

    What is left of a layer is rounded to a multiple of `multiple`. Of channels that are equally important the first go
    first. Raises NotFinite for weights that are not, TaskFailure for a model of which no channel can be taken out.
    """
    check_finite(model)
    coupling = coupling_of(model, example)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    widths = _widths(model, coupling)
    if not widths:
        raise TaskFailure("channel pruning needs layers whose channels other layers alone read (this model has none)")
    scores, gone = _importance(coupling, parameters), set()
    for width in widths:
        count = len(width.channels) - _left(width, sparsity, multiple)
        gone |= set(sorted(width.channels, key=scores.__getitem__)[:count])
    for part in coupling.parts:
        indices = [index for index, channel in enumerate(part.channels) if channel in gone and part.silences]
        if indices:
            parameters[part.name].index_fill_(part.dim, torch.tensor(indices), 0.0)
    return coupling


def alike(model: nn.Module, example: Tensor, sparsity: float, multiple: int) -> float:
    """The middle of all sparsities that leave as many channels of every layer of `model` as `sparsity` does."""
    widths = _widths(model, coupling_of(model, example))
    lowest, highest = 0.0, 1.0
    for width in widths:
        step, count = _step(width, multiple), len(width.channels)
        left = _left(width, sparsity, multiple)
        if left < count:
            lowest = max(lowest, 1 - (left / step + 0.5) * step / count)
        if left > step:
            highest = min(highest, 1 - (math.ceil(left / step) - 0.5) * step / count)
    middle = (lowest + highest) / 2
    same = all(_left(width, middle, multiple) == _left(width, sparsity, multiple) for width in widths)
    return middle if same else sparsity


def _widths(model: nn.Module, coupling: Coupling) -> list[Width]:
    free = loose(model, coupling)
    return [width for width in coupling.widths() if free.isdisjoint(width.channels)]


def _step(width: Width, multiple: int) -> int:
    return multiple // math.gcd(multiple, width.each)


def _left(width: Width, sparsity: float, multiple: int) -> int:
    """How many of the channels of `width` stay."""
    step, count = _step(width, multiple), len(width.channels)
    steps = math.floor((1 - sparsity) * count / step + 0.5)
    return min(count, max(1, steps) * step)


def _importance(coupling: Coupling, parameters: Mapping[str, Tensor]) -> dict[int, float]:
    """Squares of all weights that give a channel or read it, summed (DepGraph, section 3.3)."""
    scores: dict[int, float] = {}
    for part in coupling.parts:
        if part.role in ("gives", "reads") and part.name in parameters:
            rows = parameters[part.name].movedim(part.dim, 0).reshape(len(part.channels), -1)
            for channel, score in zip(part.channels, rows.square().sum(1).tolist(), strict=True):
                scores[channel] = scores.get(channel, 0.0) + score
    return scores
