"""One of several tensors that an op gives, as an op that gives it alone."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any, cast

from torch import fx

from qsweep.hub.bags import BAGS, reduced_rows
from qsweep.hub.kinds import aten
from qsweep.hub.nodes import arguments, nodes_of, source
from qsweep.hub.traced import replace_by, shape_of

_SPLITS = {aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default}
_ALONE: dict[Any, tuple[Any, ...]] = {
    aten.max.dim: (aten.amax.default, aten.argmax.default),
    aten.min.dim: (aten.amin.default, aten.argmin.default),
    aten.var_mean.dim: (aten.var.dim, aten.mean.dim),
    aten.var_mean.correction: (aten.var.correction, aten.mean.dim),
    aten.std_mean.dim: (aten.std.dim, aten.mean.dim),
    aten.std_mean.correction: (aten.std.correction, aten.mean.dim),
    aten.max_pool1d_with_indices.default: (aten.max_pool1d.default,),
    aten.max_pool2d_with_indices.default: (aten.max_pool2d.default,),
    aten.max_pool3d_with_indices.default: (aten.max_pool3d.default,),
}
"""For each of the tensors that an op gives the op that gives it alone, whose arguments have the same names."""
_GRIDS = {aten.meshgrid.default, aten.meshgrid.indexing}


def without_tuples(graph: fx.GraphModule) -> None:
    """Ops that give one tensor for those that give several, in place, as far as there are any."""
    for node in nodes_of(graph, {operator.getitem}):
        given, index = source(node), cast(int, node.args[1])
        with graph.graph.inserting_before(node):
            part = _part(graph, given, index)
        if part is not None:
            replace_by(node, part)


def _part(graph: fx.GraphModule, given: fx.Node, index: int) -> fx.Node | None:
    if given.target is aten.unbind.int:
        return graph.graph.call_function(aten.select.int, (given.args[0], arguments(given)["dim"], index))
    if given.target in BAGS:
        return reduced_rows(graph, given) if index == 0 else None
    if given.target in _GRIDS:
        return _of_grid(graph, given, index)
    if given.target in _ALONE:
        known = _ALONE[given.target]
        return _alone(graph, given, known[index]) if index < len(known) else None
    return _slice(graph, given, index) if given.target in _SPLITS else None


def _of_grid(graph: fx.GraphModule, grid: fx.Node, index: int) -> fx.Node | None:
    """Coordinates repeated along the others; None for sizes known at run time only."""
    axes = cast(Sequence[fx.Node], grid.args[0])
    shapes = [shape_of(axis) for axis in axes]
    if any(shape is None or any(size < 0 for size in shape) for shape in shapes):
        return None
    order = list(range(len(axes)))
    if grid.kwargs.get("indexing") == "xy" and len(axes) > 1:
        order[:2] = 1, 0
    sizes = [math.prod(shapes[place] or ()) for place in order]
    alone = [size if place == index else 1 for place, size in zip(order, sizes, strict=True)]
    values = graph.graph.call_function(aten.reshape.default, (axes[index], alone))
    return graph.graph.call_function(aten.expand.default, (values, sizes))


def _alone(graph: fx.GraphModule, given: fx.Node, op: Any) -> fx.Node:
    values = arguments(given)
    wanted = [argument for argument in op._schema.arguments if argument.name in values]
    if op in (aten.amax.default, aten.amin.default):
        values["dim"] = [values["dim"]]
    args = tuple(values[argument.name] for argument in wanted if not argument.kwarg_only)
    return graph.graph.call_function(op, args, {one.name: values[one.name] for one in wanted if one.kwarg_only})


def _slice(graph: fx.GraphModule, split: fx.Node, index: int) -> fx.Node | None:
    if (shape := shape_of(source(split))) is None:
        return None
    _, sizes, dim = arguments(split).values()
    if shape[dim] < 0 or index < 0 or split.all_input_nodes != [source(split)]:  # sizes known at run time only
        return None
    if split.target is aten.chunk.default:
        sizes = -(-shape[dim] // sizes)
    if isinstance(sizes, int):
        sizes = [sizes] * (index + 1)
    start = sum(sizes[:index])
    return graph.graph.call_function(aten.slice.Tensor, (split.args[0], dim, start, start + sizes[index]))
