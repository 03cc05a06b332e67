"""Ranking the weights of a whole network."""

from __future__ import annotations

import torch
from torch import nn

from qsweep.errors import TaskFailure
from qsweep.weights import apply_masks, check_finite, weight_names


def zero_smallest(model: nn.Module, sparsity: float) -> None:
    """Set `round(sparsity * count)` of the convolution and linear weights to zero, in place: the smallest magnitudes.

    Of equal magnitudes the first in the model go first. Raises NotFinite for weights that are not, TaskFailure for a
    model without such weights.
    """
    check_finite(model)
    parameters = dict(model.named_parameters())
    weights = {name: parameters[name].detach() for name in weight_names(model)}
    if not weights:
        raise TaskFailure("magnitude pruning needs a model with convolutions or linears (this one has none)")
    magnitudes = torch.cat([weight.abs().flatten() for weight in weights.values()])
    keep = torch.ones_like(magnitudes, dtype=torch.bool)
    keep[magnitudes.argsort(stable=True)[: round(sparsity * len(magnitudes))]] = False
    parts = keep.split([weight.numel() for weight in weights.values()])  # type: ignore[no-untyped-call]
    apply_masks(model, {name: part.view_as(weights[name]) for name, part in zip(weights, parts, strict=True)})
