"""Where grids stand in a graph, and how observed grids become quantize and dequantize ops.

A value is quantized when an op that can work in integers reads it. That op alone reads the quantized value: what a
float op reads stays float. Ops that only move values share one observer with their input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from qsweep.errors import NotFinite
from qsweep.hub.form import (
    BINARY,
    COMPUTE,
    DEQUANTIZE,
    DEQUANTIZE_WEIGHT,
    POOLS,
    QUANTIZE,
    RECTIFIERS,
    SAME_GRID,
    QuantizedModel,
    aten,
    constant,
    set_constant,
)
from qsweep.hub.ties import settle_mean, settle_sum


class Grid(NamedTuple):
    """Real value = (integer - zero_point) * scale, integer from low to high."""

    scale: float
    zero_point: int
    low: int
    high: int


class ActivationObserver(Protocol):
    def grid(self) -> Grid:
        """The grid of this tensor; the scale is a float32 number."""


class WeightObserver(Protocol):
    def integers(self, weight: Tensor, smallest_scale: Tensor) -> tuple[Tensor, Tensor, int, int]:
        """Integers (int8), scale (C,) no smaller than `smallest_scale`, lowest and highest level."""


def insert_observers(
    model: QuantizedModel, activation: Callable[[bool], nn.Module], weight: Callable[[], nn.Module]
) -> None:
    """Put observers (or fake quantizers) on every value that will be quantized, in place.

    `activation(nonnegative)` and `weight()` make them. Names are those of the values: `observe_relu_3`.
    """
    graph = model.graph
    ShapeProp(graph).propagate(model.example)
    wanted = _wanted(graph)
    observers: dict[fx.Node, str] = {}
    for value in [node for node in graph.graph.nodes if node in wanted]:
        group = _grid_source(value)
        if group not in observers:
            observers[group] = f"observe_{group.name}"
            graph.add_submodule(observers[group], activation(_nonnegative(group)))
        with graph.graph.inserting_after(value):
            observed = graph.graph.call_module(observers[group], (value,))
        for user in [user for user in value.users if user is not observed and _reads_integers(user, value, wanted)]:
            user.replace_input_with(value, observed)
    for node in [
        node for node in graph.graph.nodes if node.target in COMPUTE and constant(graph, node.args[1]) is not None
    ]:
        name = f"observe_{node.name}_weight"
        graph.add_submodule(name, weight())
        with graph.graph.inserting_before(node):
            observed = graph.graph.call_module(name, (node.args[1],))
        node.args = (node.args[0], observed, *node.args[2:])
    graph.recompile()


def _wanted(graph: fx.GraphModule) -> set[fx.Node]:
    wanted: set[fx.Node] = set()
    for node in reversed(graph.graph.nodes):
        if node.op != "get_attr" and any(_reads_integers(user, node, wanted) for user in node.users):
            wanted.add(node)
    return wanted


def _reads_integers(user: fx.Node, value: fx.Node, wanted: set[fx.Node]) -> bool:
    if user.target in COMPUTE:
        return user.args[0] is value
    if user.target in BINARY:
        others = [arg for arg in user.args if isinstance(arg, fx.Node)]
        return len(others) == 2 and all(other.op != "get_attr" for other in others) and not user.kwargs
    return user.target in POOLS or (user.target in SAME_GRID and user in wanted)


def _grid_source(value: fx.Node) -> fx.Node:
    """The value whose grid `value` is on: through ops that only move values."""
    while value.target in SAME_GRID:
        value = value.all_input_nodes[0]
    return value


def _nonnegative(value: fx.Node) -> bool:
    if value.target in {aten.hardtanh.default, aten.hardtanh_.default}:
        return len(value.args) > 1 and cast(float, value.args[1]) >= 0
    if value.target in POOLS:
        return _nonnegative(_grid_source(value.all_input_nodes[0]))
    return value.target in RECTIFIERS


def convert(model: QuantizedModel) -> QuantizedModel:
    """Replace observers by quantize and dequantize ops with integer weights and snapped biases, in place."""
    graph = model.graph
    activations, weights = [], []
    for node in graph.graph.nodes:
        if node.op == "call_module" and str(node.target).startswith("observe_"):
            (weights if constant(graph, node.args[0]) is not None else activations).append(node)
    grids = _settled(
        graph, {node: cast(ActivationObserver, graph.get_submodule(str(node.target))).grid() for node in activations}
    )
    for node in activations:
        _convert_activation(graph, node, grids[node])
    for node in weights:
        _convert_weight(graph, node)
    for name in {str(node.target) for node in activations + weights}:
        graph.delete_submodule(name)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return model


def _settled(graph: fx.GraphModule, grids: dict[fx.Node, Grid]) -> dict[fx.Node, Grid]:
    """The grids, those of sums and means moved to where every runtime rounds alike (see `qsweep.hub.ties`)."""
    moved: dict[str, float] = {}
    for node, grid in grids.items():
        source = cast(fx.Node, node.args[0])
        while source.target in RECTIFIERS:
            source = source.all_input_nodes[0]
        given = [
            grids[argument]._replace(scale=moved.get(str(argument.target), grids[argument].scale))
            for argument in source.all_input_nodes
            if argument in grids
        ]
        if source.target in BINARY and len(given) == 2:
            moved[str(node.target)] = settle_sum(given[0], given[1], grid.scale, grid.zero_point)
        elif source.target in POOLS and len(given) == 1 and (count := _pool_size(source)):
            low, high = given[0].low - given[0].zero_point, given[0].high - given[0].zero_point
            moved[str(node.target)] = settle_mean(given[0].scale, low, high, count, grid.scale)
    return {node: grid._replace(scale=moved.get(str(node.target), grid.scale)) for node, grid in grids.items()}


def _pool_size(pool: fx.Node) -> int | None:
    """Elements that a global pool averages; None for other pools, which average in float."""
    if pool.target is not aten.adaptive_avg_pool2d.default or list(cast(list[int], pool.args[1])) != [1, 1]:
        return None
    shape = pool.all_input_nodes[0].all_input_nodes[0].meta["tensor_meta"].shape
    return int(shape[-1] * shape[-2])


def _convert_activation(graph: fx.GraphModule, node: fx.Node, grid: Grid) -> None:
    arguments = (*grid, torch.int8)
    with graph.graph.inserting_before(node):
        integers = graph.graph.call_function(QUANTIZE, (node.args[0], *arguments))
    for user in list(node.users):  # one dequantize a reader: runtimes match the pair
        with graph.graph.inserting_before(user):
            user.replace_input_with(node, graph.graph.call_function(DEQUANTIZE, (integers, *arguments)))
    graph.graph.erase_node(node)


@torch.no_grad()
def _convert_weight(graph: fx.GraphModule, node: fx.Node) -> None:
    (compute,) = node.users
    weight = constant(graph, node.args[0])
    bias = constant(graph, compute.args[2]) if len(compute.args) > 2 else None
    assert weight is not None
    name = str(cast(fx.Node, node.args[0]).target)
    if not weight.isfinite().all():
        raise NotFinite(f"`{name}`: weights must be finite (got {int((~weight.isfinite()).sum())} that are not)")
    given = cast(fx.Node, compute.args[0])
    input_scale = cast(float, given.args[1]) if given.target is DEQUANTIZE else None
    smallest = torch.zeros(len(weight))
    if bias is not None and input_scale is not None:  # the bias must fit an int32 accumulator with room for the sum
        smallest = bias.abs() / (input_scale * 2**30)
    observer = cast(WeightObserver, graph.get_submodule(str(node.target)))
    integers, scale, low, high = observer.integers(weight, smallest)
    if len(cast(fx.Node, node.args[0]).users) > 1:
        name = f"{name}_{compute.name}"
    set_constant(graph, name, integers)
    set_constant(graph, f"{name}_scale", scale)
    set_constant(graph, f"{name}_zero_point", torch.zeros(len(weight), dtype=torch.int64))
    with graph.graph.inserting_before(node):
        parts = [graph.graph.get_attr(f"{name}{suffix}") for suffix in ("", "_scale", "_zero_point")]
        dequantized = graph.graph.call_function(DEQUANTIZE_WEIGHT, (*parts, 0, low, high, torch.int8))
    node.replace_all_uses_with(dequantized)
    graph.graph.erase_node(node)
    if bias is not None and input_scale is not None:
        step = torch.tensor(input_scale) * scale
        set_constant(graph, str(cast(fx.Node, compute.args[2]).target), (bias / step).round() * step)
