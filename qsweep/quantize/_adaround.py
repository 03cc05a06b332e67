"""AdaRound: weights rounded up or down, whichever keeps the layer's output."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qsweep.quantize._arithmetic import WeightLevels
from qsweep.quantize._layerwise import Layer
from qsweep.quantize._patches import as_rows, flat_levels, groups_of, patches

_ZETA, _GAMMA = 1.1, -0.1
_WEIGHT = 0.01
_WARM_UP = 0.2
_RATE = 0.02
_ROWS = 512


def adaround(layer: Layer, iterations: int, generator: torch.Generator) -> Tensor:
    """Integers (C, ...), float32, each one of the two levels about its weight, or the last level for one beyond it.

    Minimises |f(W x) - f(W~ x')|^2 over the layer's outputs, f the rectifier that follows, x' the inputs from the model
    rounded so far, with the rectified sigmoid h(V) in place of the choice and a regulariser that drives it to 0 or 1
    (Nagel et al. 2020, "Up or Down? Adaptive Rounding for Post-Training Quantization", equations 21 to 25). A channel
    keeps nearest rounding unless its output error, on all of the layer's inputs, becomes less than with that. Weights
    that are exactly zero stay zero.
    """
    nearest = layer.levels.integers(layer.weight)
    chosen = _learnt(layer, iterations, generator)
    better = layer.errors(layer.levels.real(chosen)) < layer.errors(layer.levels.real(nearest))
    return torch.where(better.reshape(-1, *[1] * (chosen.dim() - 1)), chosen, nearest)


@dataclass(frozen=True)
class _Choices:
    """The two levels of each weight, (g, C/g, K): `down`, and one more for those that are not `fixed`."""

    down: Tensor
    fixed: Tensor
    scale: Tensor
    zero_point: Tensor
    levels: WeightLevels

    def integers(self, up: Tensor) -> Tensor:
        """Levels for `up`, 0 to 1: between two of them while it is learnt."""
        return (self.down + up.masked_fill(self.fixed, 0.0)).clamp(self.levels.low, self.levels.high)

    def real(self, up: Tensor) -> Tensor:
        return (self.integers(up) - self.zero_point) * self.scale


@torch.enable_grad()
def _learnt(layer: Layer, iterations: int, generator: torch.Generator) -> Tensor:
    groups = groups_of(layer.node)
    weight = as_rows(layer.weight.detach(), groups)
    scale, zero_point = flat_levels(layer.levels, layer.weight, groups)
    steps = weight * (1 / scale)
    choices = _Choices(steps.floor() + zero_point, weight == 0, scale, zero_point, layer.levels)
    share = (steps - steps.floor()).clamp(0, 1)
    variables = torch.log((share - _GAMMA) / (_ZETA - share)).requires_grad_()
    bias = torch.zeros(len(layer.weight)) if layer.bias is None else layer.bias.detach()
    bias = bias.reshape(groups, 1, -1)
    inputs, targets = patches(layer, generator)
    targets = layer.rectified(targets)
    optimizer = torch.optim.Adam([variables], lr=_RATE)
    for step in range(iterations):
        rows, up = _batch(step, inputs.shape[1]), _up(variables)
        outputs = layer.rectified(torch.baddbmm(bias, inputs[:, rows], choices.real(up).transpose(1, 2)))
        loss = (outputs - targets[:, rows]).square().sum() / outputs.shape[1] + _regularizer(up, step / iterations)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return choices.integers((_up(variables.detach()) >= 0.5).float()).reshape(layer.weight.shape)


def _regularizer(up: Tensor, done: float) -> Tensor | float:
    """Equation 24 times its weight, with beta from 20 to 2 along a cosine; 0 in the first fifth."""
    if done < _WARM_UP:
        return 0.0
    beta = 11 + 9 * math.cos(math.pi * (done - _WARM_UP) / (1 - _WARM_UP))
    return _WEIGHT * (1 - (2 * up - 1).abs().pow(beta)).sum()


def _batch(step: int, count: int) -> slice:
    """The rows of a step: one part after the other, over and over, of rows in random order."""
    start = step % max(1, count // _ROWS) * _ROWS
    return slice(start, start + _ROWS)


def _up(variables: Tensor) -> Tensor:
    """h(V): how far each weight is rounded up, 0 to 1."""
    return (torch.sigmoid(variables) * (_ZETA - _GAMMA) + _GAMMA).clamp(0, 1)
