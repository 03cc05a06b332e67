"""Which values of a graph stand on grids, and which of their readers read them there.

A value is quantized when an op that can work in integers reads it. That op alone reads the quantized value: what a
float op reads stays float. A function of one number reads integers where its result becomes some. Products element by
element work in integers where both sides are as well known as sums and pools are: what layers, sums and pools give, and
functions of it, but no norm's factor, which 8 bits are too few for. Ops that only move values share one grid with their
inputs, and so do the parts of a concatenation, but not columns of what the model takes: those have grids of their own.

What a convolution gives is quantized for all its readers, unless it is the last layer or the model gives it as it is:
runtimes whose convolutions give integers alone would compute it in floating point otherwise. Batch norms of images that
no layer takes in are such convolutions, of each channel with one number, where they read what gates may read and their
result becomes integers.

Sums and products that the model gives, functions and moves of them between, read real numbers but for what convolutions
give: they give real ones, and what they undo, such as a normalization of a series, may have any range.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import fx

from qsweep.hub.form import layers_of
from qsweep.hub.kinds import BINARY, COMPUTE, CONVOLUTIONS, NORMS, POINTWISE, POOLS, RECTIFIERS, aten, keeps_grid
from qsweep.hub.nodes import arguments, is_real, nodes_of, reached, shape_seen, source
from qsweep.hub.norm import joins, stands_alone


def readers_on_grids(graph: fx.GraphModule, real: Collection[fx.Node] = ()) -> dict[fx.Node, list[fx.Node]]:
    """By value that is to be quantized, in order: who reads it so. Takes what ShapeProp and `fixed_nodes` know.

    `real`: layers that stay in floating point; with them do ops that read of what they give alone, and those whose
    results they alone read.
    """
    shown = reached([source(graph.graph.output_node())], lambda node: node.all_input_nodes if moves(node) else ())
    floats = _left_real(graph, real)
    given, known = _given_by_convolutions(graph) - shown - floats, _known(graph)
    reals = floats | _last(graph)
    ends = {norm: end_of(norm) for norm in nodes_of(graph, NORMS) if norm in known and stands_alone(norm)}
    norms = {norm: end for norm, end in ends.items() if end not in shown and norm not in floats}
    wanted: set[fx.Node] = set()

    def reads_integers(user: fx.Node, value: fx.Node) -> bool:
        if user in reals:
            return moves(user) and user in wanted
        return norms[user] in wanted if user in norms else _reads_integers(user, value, wanted, known)

    for node in reversed(graph.graph.nodes):
        if _fixed(node) or not is_real(node):
            continue
        if node in given or any(reads_integers(user, node) for user in node.users):
            wanted.add(node)
    given |= wanted.intersection(norms.values())
    return {
        value: [user for user in value.users if value in given or reads_integers(user, value)]
        for value in graph.graph.nodes
        if value in wanted
    }


def readers_that_are_layers(graph: fx.GraphModule, real: Collection[fx.Node] = ()) -> dict[fx.Node, list[fx.Node]]:
    """The same, where only layers read integers."""
    layers = [node for node in nodes_of(graph, COMPUTE) if node not in real]
    wanted = {given for node in layers if not _fixed(given := source(node))}
    return {
        value: [user for user in value.users if user in layers and _multiplies(user, value)]
        for value in graph.graph.nodes
        if value in wanted
    }


def _left_real(graph: fx.GraphModule, layers: Collection[fx.Node]) -> set[fx.Node]:
    """`layers`, values that are computed from nothing but what they give, and those that nothing else reads."""
    behind, before = set(layers), set(layers)
    for node in graph.graph.nodes:
        read = [value for value in node.all_input_nodes if not _fixed(value) and is_real(value)]
        if node.op == "call_function" and node.target not in COMPUTE and read and behind.issuperset(read):
            behind.add(node)
    for node in reversed(graph.graph.nodes):
        if node.target not in COMPUTE and node.users and before.issuperset(node.users):
            before.add(node)
    return behind | before


def _last(graph: fx.GraphModule) -> set[fx.Node]:
    """Sums and products, functions and moves, that nothing but such and the output of the model read."""
    output = graph.graph.output_node()
    found = {output}
    for node in reversed(graph.graph.nodes):
        if (node.target in BINARY | POINTWISE | RECTIFIERS or moves(node)) and found.issuperset(node.users):
            found.add(node)
    return {node for node in found if node.target in BINARY}


def groups_of(graph: fx.GraphModule, wanted: dict[fx.Node, list[fx.Node]]) -> list[list[fx.Node]]:
    """The `wanted` values by grid, in order of execution."""
    group = {value: [value] for value in wanted}
    for node in wanted:
        if moves(node):
            for given in node.all_input_nodes:
                joined = group[given] + [value for value in group[node] if value not in group[given]]
                group.update(dict.fromkeys(joined, joined))
    order = {node: place for place, node in enumerate(graph.graph.nodes)}
    groups = {id(values): sorted(values, key=order.__getitem__) for values in group.values()}
    return sorted(groups.values(), key=lambda values: order[values[0]])


def moves(node: fx.Node) -> bool:
    """Whether `node` only moves values that a grid can stand on: no constants, no sizes."""
    given = node.all_input_nodes
    on_one = keeps_grid(node) and not is_given(node)
    return on_one and all(not _fixed(value) and "tensor_meta" in value.meta for value in given)


def is_given(node: fx.Node) -> bool:
    """Whether it is what the model takes, or some columns (channels, features, one step) of that, whose values may have
    nothing in common with others."""
    if node.target is aten.select.int:
        return is_given(source(node))
    if node.target is aten.slice.Tensor and is_given(source(node)):
        dims = len(shape_seen(node))
        dim = arguments(node)["dim"] % dims
        return bool(arguments(node)["step"] == 1 and (dim == 1 if dims == 4 else dim > 0))
    return node.op == "placeholder"


def _given_by_convolutions(graph: fx.GraphModule) -> set[fx.Node]:
    """What convolutions give, norm and rectifier behind them, but for the last layer."""
    return {end_of(node) for node in layers_of(graph)[:-1] if node.target in CONVOLUTIONS}


def end_of(layer: fx.Node) -> fx.Node:
    """The value that is left of `layer` once its norm is folded and its rectifier joined."""
    end = layer
    while len(end.users) == 1:
        (reader,) = end.users
        if reader.target not in RECTIFIERS and not (reader.target in NORMS and joins(reader)):
            break
        end = reader
    return end


def _reads_integers(user: fx.Node, value: fx.Node, wanted: set[fx.Node], known: set[fx.Node]) -> bool:
    if user.target in COMPUTE:
        return _multiplies(user, value)
    if user.target in BINARY:
        return user in known if user.target is aten.mul.Tensor else _of_two(user)
    return user.target in POOLS or (user in wanted and (user.target in POINTWISE or moves(user)))


def _multiplies(layer: fx.Node, value: fx.Node) -> bool:
    """Whether `value` is what `layer` multiplies by its weight, and not that weight."""
    return layer.args[0] is value and layer.args[1] is not value


def _of_two(node: fx.Node) -> bool:
    """Whether it takes two values that depend on the input, and nothing else."""
    both = all(isinstance(argument, fx.Node) and not _fixed(argument) for argument in node.args)
    return both and len(node.args) == 2 and not node.kwargs


def _known(graph: fx.GraphModule) -> set[fx.Node]:
    """What layers, sums, pools and products of two such values give, and functions of one number of these."""
    found: set[fx.Node] = set()
    for node in graph.graph.nodes:
        of_known = found.issuperset(value for value in node.all_input_nodes if not _fixed(value))
        if node.target is aten.mul.Tensor:
            kept = of_known and _of_two(node) and node.args[0] is not node.args[1]
        elif node.target in POINTWISE | RECTIFIERS | NORMS:
            kept = of_known
        else:
            kept = node.target in COMPUTE | POOLS | {aten.add.Tensor} or (of_known and moves(node))
        if kept and not _fixed(node):
            found.add(node)
    return found


def _fixed(node: fx.Node) -> bool:
    """Whether no input goes into it."""
    return bool(node.meta.get("fixed"))
