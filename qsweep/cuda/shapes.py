"""The sizes of all values of a graph at one batch size, and the work of its ops, without computing any."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from qsweep.hub.form import QuantizedModel
from qsweep.hub.kinds import DEQUANTIZE, QUANTIZE
from qsweep.hub.macs import counted
from qsweep.hub.ops import QUANTIZE_DYNAMIC, QUANTIZE_ROWS, STORED

_SAME_SIZE = {QUANTIZE, DEQUANTIZE, QUANTIZE_DYNAMIC, QUANTIZE_ROWS, *STORED}


class _Shapes(fx.Interpreter):
    """Runs a graph on tensors without content."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.found: dict[fx.Node, torch.Size] = {}
        self.macs: dict[fx.Node, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        value, self.macs[n] = counted(partial(self._value, n))
        if isinstance(value, Tensor):
            self.found[n] = value.shape
        return value

    def _value(self, node: fx.Node) -> Any:
        if node.op == "call_function" and node.target in _SAME_SIZE:
            args, _ = self.fetch_args_kwargs_from_env(node)
            return torch.empty(args[0].shape)
        return super().run_node(node)


@torch.no_grad()
def sizes_of(model: QuantizedModel, batch_size: int) -> tuple[dict[fx.Node, torch.Size], dict[fx.Node, int]]:
    """The size of every tensor of `model`'s graph for `batch_size` samples, and the multiply-accumulates of its ops."""
    shapes = _Shapes(model.graph)
    with FakeTensorMode(allow_non_fake_inputs=True):
        shapes.run(torch.empty(batch_size, *model.example.shape[1:]))
    return shapes.found, shapes.macs
