"""Weights rounded layer by layer, each against what the float model computes there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from qsweep.errors import NotFinite
from qsweep.hub.convert import least_scales
from qsweep.hub.form import DynamicGrid, Grid, QuantizedModel, RowGrid
from qsweep.hub.insert import ActivationObserver
from qsweep.hub.kinds import COMPUTE, RECTIFIERS
from qsweep.hub.nodes import constant, nodes_of, source
from qsweep.hub.ops import dynamic_fake_quantize, row_fake_quantize
from qsweep.quantize._arithmetic import WeightLevels
from qsweep.quantize._observers import NearestWeight


@dataclass(frozen=True)
class Layer:
    """A convolution or linear, what it reads in the model rounded so far, and what it gives in the float model."""

    node: fx.Node
    weight: Tensor
    """(C, ...) float."""
    bias: Tensor | None
    inputs: Tensor
    """(N, ...) of the rounded model, on their grid."""
    target: Tensor
    """(N, ...) outputs of the float model, before the rectifier that may follow."""
    levels: WeightLevels

    def outputs(self, weight: Tensor) -> Tensor:
        """The layer's outputs for its `inputs` with `weight`, before the rectifier."""
        op: Any = self.node.target
        return cast(Tensor, op(self.inputs, weight, self.bias, *self.node.args[3:], **self.node.kwargs))

    def rectified(self, values: Tensor) -> Tensor:
        """What the network goes on with: `values` after the rectifier, where one alone reads the layer's outputs."""
        readers = list(self.node.users)
        if len(readers) != 1 or readers[0].target not in RECTIFIERS:
            return values
        op: Any = readers[0].target
        return cast(Tensor, op(values, *readers[0].args[1:], **readers[0].kwargs))

    def errors(self, weight: Tensor) -> Tensor:
        """(C,) squared errors of the rectified outputs with `weight`, summed over samples and positions."""
        squares = (self.rectified(self.outputs(weight)) - self.rectified(self.target)).square()
        return squares.movedim(-1 if self.weight.dim() == 2 else 1, 0).flatten(1).sum(1)


Rounding = Callable[[Layer, torch.Generator], Tensor]
"""Integers, float32, of the shape of the layer's weight: levels of `Layer.levels`."""


@dataclass(frozen=True)
class Rounded:
    integers: Tensor
    levels: WeightLevels


@torch.no_grad()
def rounded_layers(
    model: QuantizedModel,
    inputs: Tensor,
    rounding: Rounding,
    generator: torch.Generator,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Rounded]:
    """The rounded weights of each observed layer by the name of its node. `inputs`: (N, ...) float32.

    One pass through the float and the rounded model side by side: a layer reads what the layers rounded before it give
    and aims at what the float model gives (Nagel et al. 2020, "Up or Down? Adaptive Rounding for Post-Training
    Quantization", section 3.3). Layers that share a weight are rounded once, at the first of them.
    """
    walk = _Walk(model.graph, rounding, generator, progress)
    walk.run(inputs)
    return walk.found


@dataclass(frozen=True)
class _Pair:
    """A value of the graph in the float model and in the rounded one; the same object until they part."""

    plain: Any
    rounded: Any


class _Walk(fx.Interpreter):
    def __init__(
        self,
        graph: fx.GraphModule,
        rounding: Rounding,
        generator: torch.Generator,
        progress: Callable[[str], None],
    ) -> None:
        super().__init__(graph)
        self.extra_traceback = False
        self.rounding, self.generator, self.progress = rounding, generator, progress
        self.found: dict[str, Rounded] = {}
        self.observers = {node: found for node in nodes_of(graph, COMPUTE) if (found := _observer(graph, node))}
        self.smallest = _smallest(graph, self.observers)
        self.done: dict[str, Rounded] = {}

    def run_node(self, n: fx.Node) -> _Pair:
        if n in self.observers:
            return self._layer(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if n.op == "call_module":
            return self._observed(n, args[0])
        call = getattr(self, n.op)
        plain = call(n.target, *_side("plain", args, kwargs))
        if all(self.env[node].plain is self.env[node].rounded for node in n.all_input_nodes):
            return _Pair(plain, plain)
        return _Pair(plain, call(n.target, *_side("rounded", args, kwargs)))

    def _observed(self, node: fx.Node, value: _Pair) -> _Pair:
        observer = self.submodules[str(node.target)]
        if isinstance(observer, NearestWeight):
            return value
        grid = cast(ActivationObserver, observer).grid()
        if isinstance(grid, DynamicGrid):
            return _Pair(value.plain, dynamic_fake_quantize(value.rounded, *grid))
        if isinstance(grid, RowGrid):
            return _Pair(value.plain, row_fake_quantize(value.rounded, *grid))
        return _Pair(value.plain, torch.fake_quantize_per_tensor_affine(value.rounded, *grid))

    def _layer(self, node: fx.Node) -> _Pair:
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        op = cast(Any, node.target)
        (_, *rest), named = _side("plain", args, kwargs)
        target = op(args[0].plain, *rest, **named)
        name, observer = str(source(source(node, 1)).target), self.observers[node]
        weight = rest[0]
        if not (weight.isfinite().all() and _finite(target)):
            what = "an activation is NaN or infinite on the calibration samples"
            raise NotFinite(what if weight.isfinite().all() else f"`{name}`: must hold finite numbers")
        if name not in self.done:
            self.progress(f"rounding, layer {len(self.found) + 1} of {len(self.observers)}")
            levels = observer.fitted(weight, self.smallest[name])
            bias = rest[1] if len(rest) > 1 else None
            layer = Layer(node, weight, bias, args[0].rounded, target, levels)
            self.done[name] = Rounded(self.rounding(layer, self.generator), levels)
        self.found[node.name] = chosen = self.done[name]
        real = chosen.levels.real(chosen.integers)
        return _Pair(target, op(args[0].rounded, real, *rest[1:], **named))


def _finite(values: Tensor) -> bool:
    return not values.numel() or bool(torch.stack(values.aminmax()).isfinite().all())


def _side(side: str, args: Any, kwargs: Any) -> tuple[Any, Any]:
    def pick(value: Any) -> Any:
        return getattr(value, side) if isinstance(value, _Pair) else value

    return map_aggregate(args, pick), map_aggregate(kwargs, pick)


def _observer(graph: fx.GraphModule, node: fx.Node) -> NearestWeight | None:
    observed = source(node, 1)
    module = graph.get_submodule(str(observed.target)) if observed.op == "call_module" else None
    return module if isinstance(module, NearestWeight) else None


def _smallest(graph: fx.GraphModule, layers: dict[fx.Node, NearestWeight]) -> dict[str, Tensor]:
    """(C,) smallest scales by the name of the weight, as `convert` will ask for them."""
    found: dict[str, Tensor] = {}
    for node in layers:
        name, given = str(source(source(node, 1)).target), source(node)
        weight = constant(graph, source(source(node, 1)))
        bias = constant(graph, node.args[2]) if len(node.args) > 2 else None
        assert weight is not None
        grid = None
        if given.op == "call_module":
            grid = cast(ActivationObserver, graph.get_submodule(str(given.target))).grid()
        least = least_scales(weight, bias, grid.scale if isinstance(grid, Grid) else None)
        found[name] = torch.maximum(least, found.get(name, least))
    return found
