"""Whether numbers fit the type that a model is cast to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from qsweep.errors import NotFinite
from qsweep.hub.form import QuantizedModel
from qsweep.hub.nodes import attributes

_BATCH = 64


def check_range(model: QuantizedModel) -> None:
    """Raises NotFinite where a constant of `model` is NaN, or infinite in the type it is cast to."""
    for name, value in attributes(model.graph):
        wrong = ~value.to(model.dtype).isfinite()
        if value.is_floating_point() and wrong.any():
            raise _beyond(f"`{name}`:", value[wrong].abs().max().item(), model.dtype)


def check_activations(model: QuantizedModel, inputs: Tensor) -> None:
    """Raises NotFinite where an activation is finite in float32 and infinite in the type that `model` is cast to.

    `inputs`: (N, ...) float32. Such values may be finite again at the outputs (a sigmoid makes 1 of them), which then
    tell nothing. The graph runs in float32: what overflows there by the range alone overflows in every engine.
    """
    for batch in torch.split(inputs, _BATCH):
        _Watch(model).run(batch)


class _Watch(fx.Interpreter):
    def __init__(self, model: QuantizedModel) -> None:
        super().__init__(model.graph)
        self.extra_traceback = False
        self.dtype = model.dtype

    @torch.no_grad()
    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op != "get_attr" and isinstance(value, Tensor) and value.is_floating_point() and value.numel():
            ends = torch.stack(value.aminmax())
            if ends.isfinite().all() and not ends.to(self.dtype).isfinite().all():
                what = f"`{n.name}`, an activation on the training samples,"
                raise _beyond(what, ends.abs().max().item(), self.dtype)
        return value


def _beyond(what: str, worst: float, dtype: torch.dtype) -> NotFinite:
    return NotFinite(f"{what} must be finite in {dtype}, at most {torch.finfo(dtype).max:g} (got {worst:g})")
