"""GPTQ: columns of weights rounded one by one, the rest moved to make up for each."""

from __future__ import annotations

import torch
from torch import Tensor

from qsweep.quantize._layerwise import Layer
from qsweep.quantize._patches import as_rows, flat_levels, groups_of, patches

_DAMPING = 0.01
_BLOCK = 128
_ROWS = 4096


def gptq(layer: Layer, generator: torch.Generator) -> Tensor:
    """Integers (C, ...), float32, for the Hessian of the layer's inputs from the model rounded so far."""
    groups = groups_of(layer.node)
    inputs, _ = patches(layer, generator)
    hessian = torch.zeros(groups, inputs.shape[2], inputs.shape[2], dtype=torch.float64)
    for rows in torch.split(inputs, _ROWS, dim=1):  # products in float32, their sum in float64: exact enough, faster
        hessian += 2 * (rows.mT @ rows)
    scale, zero_point = flat_levels(layer.levels, layer.weight, groups)
    weight = as_rows(layer.weight.detach(), groups)
    integers = second_order(weight, hessian, scale, zero_point, layer.levels.low, layer.levels.high)
    return integers.reshape(layer.weight.shape)


def second_order(weight: Tensor, hessian: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
    """Integers (g, C, K), float32, for `weight` (g, C, K), its levels (g, C, K) and `hessian` (g, K, K) = 2 X X^T.

    Frantar et al. 2023, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", algorithm
    1, with fixed levels, 1 % damping and the columns of large second derivatives first. Weights that are exactly zero
    stay zero, and the others make up for that (Frantar and Alistarh 2023, "SparseGPT", section 3). A row keeps nearest
    rounding unless its error d H d^T, d the difference to its weights, becomes less.
    """
    order = hessian.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
    by_column = order.unsqueeze(1).expand(weight.shape)
    sorted_weight, sorted_scale, sorted_zero = (
        values.double().gather(2, by_column) for values in (weight, scale, zero_point)
    )
    sorted_hessian = hessian.double().gather(1, order.unsqueeze(2).expand(hessian.shape))
    sorted_hessian = sorted_hessian.gather(2, order.unsqueeze(1).expand(hessian.shape))
    factor = _inverse_factor(sorted_hessian)
    chosen = _by_columns(sorted_weight, sorted_scale, sorted_zero, factor, low, high)
    chosen = torch.zeros_like(chosen).scatter(2, by_column, chosen).float()
    nearest = ((weight * (1 / scale)).round() + zero_point).clamp(low, high)
    errors = [_error(weight - (integers - zero_point) * scale, hessian) for integers in (chosen, nearest)]
    return torch.where((errors[0] < errors[1]).unsqueeze(2), chosen, nearest)


def _by_columns(weight: Tensor, scale: Tensor, zero_point: Tensor, factor: Tensor, low: int, high: int) -> Tensor:
    """Algorithm 1 in float64; `factor` (g, K, K): the upper Cholesky factor of the inverse of the Hessian."""
    kept = weight != 0
    weight, integers = weight.clone(), torch.empty_like(weight)
    width = weight.shape[2]
    for start in range(0, width, _BLOCK):
        end = min(start + _BLOCK, width)
        errors = torch.empty_like(weight[:, :, start:end])
        for column in range(start, end):
            current, offset = weight[:, :, column], zero_point[:, :, column]
            level = ((current / scale[:, :, column]).round() + offset).clamp(low, high)
            level = torch.where(kept[:, :, column], level, offset)
            error = (current - (level - offset) * scale[:, :, column]) / factor[:, column, column].unsqueeze(1)
            weight[:, :, column:end] -= error.unsqueeze(2) * factor[:, column, column:end].unsqueeze(1)
            integers[:, :, column], errors[:, :, column - start] = level, error
        weight[:, :, end:] -= errors @ factor[:, start:end, end:]
    return integers


def _inverse_factor(hessian: Tensor) -> Tensor:
    """Upper Cholesky factor of the inverse of the damped `hessian` (g, K, K); damped more where that is singular.

    Inputs that are always zero get a second derivative of 1: their weights are rounded alone.
    """
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    mean = diagonal.mean(1, keepdim=True)
    damping = _DAMPING * torch.where(mean > 0, mean, 1.0)
    dead = (diagonal == 0).double()
    while True:
        damped = hessian + torch.diag_embed(damping + dead)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed.any():
            inverse: Tensor
            inverse, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor))
            if not failed.any():
                return inverse.mT
        damping = damping * 10


def _error(difference: Tensor, hessian: Tensor) -> Tensor:
    """(g, C) d H d^T for each row d of `difference` (g, C, K)."""
    difference = difference.double()
    return ((difference @ hessian.double()) * difference).sum(2)
