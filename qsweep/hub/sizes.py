"""Sizes that depend on the batch, in ops that the hub form knows."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from qsweep.errors import ExportFailure
from qsweep.hub.kinds import SIZE, aten
from qsweep.hub.nodes import arguments, nodes_of
from qsweep.hub.traced import line_of, shape_of


def with_fixed_shapes(graph: fx.GraphModule) -> None:
    """Shapes that count samples at run time as shapes with one -1, which reads no tensor, in place."""
    for node in nodes_of(graph, {aten.reshape.default}):
        shape, sizes = shape_of(node), [*arguments(node).values()][1]
        if shape is not None and any(isinstance(size, fx.Node) for size in sizes):
            node.args = (node.args[0], shape)


def with_sizes_of_tensors(graph: fx.GraphModule) -> None:
    """What a model computes from the batch size, such as `b * t`, as the size of a tensor that has it, in place.

    Raises ExportFailure where no tensor has it along one dimension, or several that follow each other.
    """
    order = {node: place for place, node in enumerate(graph.graph.nodes)}
    for number in [node for node in graph.graph.nodes if _is_computed(node)]:
        readers = [user for user in number.users if not _is_computed(user)]
        if not readers:
            continue
        first = min(readers, key=order.__getitem__)
        with graph.graph.inserting_before(first):
            size = _size(graph, number, [node for node in order if order[node] < order[first]])
        for reader in readers:
            reader.replace_input_with(number, size)


def sizes_of(graph: fx.GraphModule, node: fx.Node) -> list[Any]:
    """The sizes of `node`, those that depend on the batch as nodes, made where the graph inserts."""
    sizes = node.meta["val"].shape
    return [
        size if isinstance(size, int) else graph.graph.call_function(SIZE, (node, i)) for i, size in enumerate(sizes)
    ]


def _is_computed(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.SymInt | torch.SymFloat) and node.target is not SIZE


def _size(graph: fx.GraphModule, number: fx.Node, before: list[fx.Node]) -> fx.Node:
    """The size of one of the tensors `before` that is `number`."""
    wanted, call = _expression(number.meta["val"]), graph.graph.call_function
    for several in (False, True):
        for node in before:
            sizes = node.meta["val"].shape if isinstance(node.meta.get("val"), torch.Tensor) else ()
            for start in range(len(sizes)):
                for end in range(start + 1, len(sizes)) if several else (start,):
                    if _expression(math.prod(sizes[start : end + 1])) == wanted:
                        tensor = call(aten.flatten.using_ints, (node, start, end)) if several else node
                        return call(SIZE, (tensor, start))
    raise ExportFailure(
        f"the model computes a number from the size of the batch (`{line_of(number)}`), and no tensor before it has "
        "this size: write sizes of tensors, their products, or -1 in a reshape"
    )


def _expression(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt | torch.SymFloat) else size
