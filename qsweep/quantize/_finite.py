"""Whether numbers fit the type that a model is cast to."""

from __future__ import annotations

import torch

from qsweep.errors import NotFinite
from qsweep.hub.form import QuantizedModel, attributes


def check_range(model: QuantizedModel) -> None:
    """Raises NotFinite where a constant of `model` is NaN, or infinite in the type it is cast to."""
    largest = torch.finfo(model.dtype).max
    for name, value in attributes(model.graph):
        wrong = ~value.to(model.dtype).isfinite()
        if value.is_floating_point() and wrong.any():
            worst = value[wrong].abs().max().item()
            raise NotFinite(f"`{name}`: must be finite in {model.dtype}, at most {largest:g} (got {worst:g})")
