"""How observed grids become quantize and dequantize ops, integer weights and snapped biases."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor, fx

from qsweep.errors import NotFinite
from qsweep.hub.activations import function_of
from qsweep.hub.affine import with_norm_layers
from qsweep.hub.form import DynamicGrid, Grid, QuantizedModel, RowGrid, grid_of
from qsweep.hub.insert import ActivationObserver, WeightObserver
from qsweep.hub.kinds import BINARY, COMPUTE, DEQUANTIZE, POINTWISE, POOLS, QUANTIZE, RECTIFIERS, aten, pool_count
from qsweep.hub.nodes import constant, nodes_of, set_constant, source
from qsweep.hub.norm import own_name
from qsweep.hub.ops import QUANTIZE_DYNAMIC, QUANTIZE_ROWS
from qsweep.hub.ties import (
    settle_again,
    settle_mean,
    settle_product,
    settle_sum,
    settle_values,
    whole_thirds,
)
from qsweep.hub.weights import Channels


def convert(model: QuantizedModel) -> QuantizedModel:
    """Replace observers by quantize and dequantize ops with integer weights and snapped biases, in place; batch norms
    between them by layers.

    Raises NotFinite for weights or biases that are not.
    """
    graph = model.graph
    with_norm_layers(graph)
    observers = [node for node in graph.graph.nodes if node.op == "call_module" and _is_observer(node)]
    weights = [node for node in observers if constant(graph, node.args[0]) is not None]
    activations = [node for node in observers if node not in weights]
    grids = _settled(graph, activations)
    for node in activations:
        if (grid := grids.get(str(node.target))) is not None:
            _convert_activation(graph, node, grid)
        else:
            _convert_dynamic(graph, node)
    for node in weights:
        _convert_weight(graph, node)
    for name in {str(node.target) for node in observers}:
        graph.delete_submodule(name)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return model


def _is_observer(node: fx.Node) -> bool:
    return str(node.target).startswith("observe_")


def _settled(graph: fx.GraphModule, activations: list[fx.Node]) -> dict[str, Grid]:
    """Fixed grids by observer, sums and means moved to where all runtimes round alike (`qsweep.hub.ties`)."""
    names = {str(node.target) for node in activations}
    found = {name: cast(ActivationObserver, graph.get_submodule(name)).grid() for name in sorted(names)}
    grids = {name: grid for name, grid in found.items() if isinstance(grid, Grid)}
    for name in _hardswishes(graph, activations) & grids.keys():
        grids[name] = grids[name]._replace(scale=whole_thirds(grids[name].scale))
    for node in [node for node in activations if str(node.target) in grids]:
        value, grid = source(node), grids[str(node.target)]
        while value.target in RECTIFIERS:
            value = source(value)
        given = [argument for argument in value.args if isinstance(argument, fx.Node) and str(argument.target) in grids]
        scale = None
        if any(each.high - each.low > 255 for each in (grid, *(grids[str(argument.target)] for argument in given))):
            continue  # no integer kernel takes them, and their pairs are too many to look at
        if str(value.target) in grids:  # the grid of sums, from which that of layers is rounded
            scale = settle_again(grids[str(value.target)], grid.scale)
        elif value.target in BINARY and len(given) == 2:
            left, right = (grids[str(argument.target)] for argument in given)
            settle = settle_product if value.target is aten.mul.Tensor else settle_sum
            scale = settle(left, right, grid.scale, grid.zero_point)
        elif value.target in POINTWISE and len(given) == 1:
            read = grids[str(given[0].target)]
            every = torch.arange(read.low, read.high + 1)
            scale = settle_values(function_of(value, read, every).numpy(), grid.scale)
        elif value.target in POOLS and len(given) == 1:
            scale = _settled_mean(value, given[0], grids[str(given[0].target)], grid)
        if scale is not None:
            grids[str(node.target)] = grid._replace(scale=scale)
    return grids


def _hardswishes(graph: fx.GraphModule, activations: list[fx.Node]) -> set[str]:
    """Names of the observers of what layers alone give and a hardswish reads."""
    readers = {str(source(node).target) for node in nodes_of(graph, {aten.hardswish.default})}
    others = {str(node.target) for node in activations if source(node).target not in COMPUTE}
    return readers - others


def _settled_mean(pool: fx.Node, observed: fx.Node, given: Grid, grid: Grid) -> float | None:
    height, width = source(observed).meta["tensor_meta"].shape[-2:]
    count = pool_count(pool, height, width)
    if count is None:
        return None
    return settle_mean(given.scale, given.low - given.zero_point, given.high - given.zero_point, count, grid.scale)


def _convert_activation(graph: fx.GraphModule, node: fx.Node, grid: Grid) -> None:
    arguments = (*grid, torch.int8 if grid.high < 128 else torch.int16)
    with graph.graph.inserting_before(node):
        integers = graph.graph.call_function(QUANTIZE, (node.args[0], *arguments))
    for user in list(node.users):  # one dequantize a reader: runtimes match the pair
        with graph.graph.inserting_before(user):
            user.replace_input_with(node, graph.graph.call_function(DEQUANTIZE, (integers, *arguments)))
    graph.graph.erase_node(node)


def _convert_dynamic(graph: fx.GraphModule, node: fx.Node) -> None:
    grid = cast(ActivationObserver, graph.get_submodule(str(node.target))).grid()
    assert isinstance(grid, DynamicGrid | RowGrid)
    target = QUANTIZE_ROWS if isinstance(grid, RowGrid) else QUANTIZE_DYNAMIC
    with graph.graph.inserting_before(node):
        node.replace_all_uses_with(graph.graph.call_function(target, (node.args[0], *grid)))
    graph.graph.erase_node(node)


@torch.no_grad()
def _convert_weight(graph: fx.GraphModule, node: fx.Node) -> None:
    readers = list(node.users)
    weight, original = _finite(graph, source(node)), str(source(node).target)
    layers = {reader: _Sums.of(graph, reader) for reader in readers if reader.target in COMPUTE}
    smallest = torch.zeros(len(weight))
    for sums in layers.values():
        smallest = torch.maximum(smallest, least_scales(weight, sums.bias, sums.step))
    stored = cast(WeightObserver, graph.get_submodule(str(node.target))).stored(weight, smallest)
    real = stored.write(graph, own_name(graph, original, *readers), before=node)
    for reader in readers:  # runtimes match each with a dequantize of its own
        with graph.graph.inserting_before(reader):
            reader.replace_input_with(node, graph.graph.node_copy(real))
    graph.graph.erase_node(node)
    for reader, sums in layers.items():
        if sums.bias is not None and sums.step is not None and isinstance(stored, Channels):
            _snap_bias(graph, reader, sums.bias, torch.tensor(sums.step) * stored.scale)


class _Sums(NamedTuple):
    """What a layer's sums start from, and the step of what it reads where that is on a fixed grid."""

    bias: Tensor | None
    step: float | None

    @staticmethod
    def of(graph: fx.GraphModule, layer: fx.Node) -> _Sums:
        bias = constant(graph, layer.args[2]) if len(layer.args) > 2 else None
        given = source(layer)
        step = grid_of(given).scale if given.target is DEQUANTIZE else None
        return _Sums(None if bias is None else _finite(graph, source(layer, 2)), step)


def least_scales(weight: Tensor, bias: Tensor | None, step: float | None) -> Tensor:
    """(C,) the least scales of `weight` (C, ...) that let `bias` fit an int32 accumulator with room for the sum.

    `step`: that of the activations; None where they are not on one fixed grid, and then any scale will do.
    """
    if bias is None or step is None:
        return torch.zeros(len(weight))
    return bias.detach().abs() / (step * 2**30)


def _snap_bias(graph: fx.GraphModule, compute: fx.Node, bias: Tensor, step: Tensor) -> None:
    name = own_name(graph, str(source(compute, 2).target), compute)
    set_constant(graph, name, (bias / step).round() * step)
    with graph.graph.inserting_before(compute):
        compute.update_arg(2, graph.graph.get_attr(name))


def _finite(graph: fx.GraphModule, node: fx.Node) -> Tensor:
    value = constant(graph, node)
    assert value is not None
    if not value.isfinite().all():
        raise NotFinite(
            f"`{node.target}`: must hold finite numbers (got {int((~value.isfinite()).sum())} that are not)"
        )
    return value
