"""Modules put on the values of a graph that will stand on grids, for those of their readers that read them there.

Layers may read a coarser grid than their other readers do: then they read the value of these rounded again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from qsweep.hub.fixed import fixed_nodes
from qsweep.hub.form import DynamicGrid, Grid, QuantizedModel, RowGrid, gated_weights, layers_of
from qsweep.hub.kinds import EMBEDDING, LINEARS, POOLS, RECTIFIERS, rectified
from qsweep.hub.nodes import constant, nodes_of, source
from qsweep.hub.readers import groups_of, is_given, moves, readers_on_grids, readers_that_are_layers
from qsweep.hub.weights import Stored

OF_LAYERS = "_layers"
"""End of the name of an observer that stands behind another one, for layers alone."""


class ActivationObserver(Protocol):
    def grid(self) -> Grid | DynamicGrid | RowGrid:
        """The grid of this tensor; the scale is a float32 number."""


class WeightObserver(Protocol):
    def stored(self, weight: Tensor, smallest_scale: Tensor) -> Stored:
        """`weight` (C, ...) as it is shipped, its scales no smaller than `smallest_scale` (C,)."""


@dataclass(frozen=True)
class Place:
    """Where an observer stands."""

    layers: tuple[str, ...]
    """Names of the weights of the convolutions and linears that read the value, such as `conv1.weight`."""
    edge: bool
    """Whether one of them is the first or the last of the model."""
    nonnegative: bool = False
    inputs: bool = False
    """Whether it stands on what the model is given, which no gradient is wanted of."""
    rows: bool = False
    """Whether linears alone read it."""


def insert_observers(
    model: QuantizedModel,
    activation: Callable[[Place], nn.Module | None],
    weight: Callable[[Place], nn.Module | None],
    embedding: Callable[[], nn.Module | None] = lambda: None,
    *,
    apart: Callable[[Place], bool] = lambda place: False,
    real: Callable[[str], bool] = lambda name: False,
    layers_only: bool = False,
) -> None:
    """Put observers (or fake quantizers) on every value that will be quantized, in place.

    `activation(place)` and `weight(place)` make them, and `embedding()` that of a table in which what follows from the
    input is looked up; None leaves the value as it is. A weight that several layers read has one observer, and one that
    is a table, too, that of the layers. A group of values on one grid shares one observer, named after the first:
    `observe_relu_3`. Where others read a value beside layers, and `apart(place)`, the layers have an
    observer of their own behind it, `observe_relu_3_layers`. Layers and tables stay in floating point where `real` says
    so of the name of their weight. With `layers_only` observers stand only on what layers read, for them alone.
    """
    graph = model.graph
    ShapeProp(graph).propagate(model.example)
    for node in fixed_nodes(graph):
        node.meta["fixed"] = True
    layers = {node: str(source(node, 1).target) for node in layers_of(graph)}
    edges = {next(iter(layers), None), next(reversed(layers), None)}
    left = [node for node, name in layers.items() if real(name)]
    layers = {node: name for node, name in layers.items() if node not in left}
    readers = readers_that_are_layers(graph, left) if layers_only else readers_on_grids(graph, left)
    groups = [[value] for value in readers] if layers_only else groups_of(graph, readers)
    signs = [all(map(_nonnegative, group)) for group in groups]
    for group, nonnegative in zip(groups, signs, strict=True):
        users = [user for value in group for user in readers[value] if user in layers]
        inputs = all(map(_given, group))
        rows = bool(users) and all(user.target in LINEARS for value in group for user in readers[value])
        place = Place(tuple(layers[user] for user in users), not edges.isdisjoint(users), nonnegative, inputs, rows)
        summed = any(user not in layers and not moves(user) for value in group for user in readers[value])
        name, wide = f"observe_{group[0].name}", place
        if users and summed and apart(place):
            wide = replace(place, layers=(), edge=False)
        if (observer := activation(wide)) is None:
            continue
        graph.add_submodule(name, observer)
        observed = [_observe(graph, value, name, readers[value]) for value in group]
        if wide is not place and (observer := activation(place)) is not None:
            graph.add_submodule(f"{name}{OF_LAYERS}", observer)
            for value in observed:
                _observe(graph, value, f"{name}{OF_LAYERS}", [user for user in value.users if user in layers])
    for name, readers_of_it in _weights(graph).items():
        if real(name):
            continue
        table = all(reader.target is EMBEDDING for reader, _ in readers_of_it)
        edge = any(reader in edges for reader, _ in readers_of_it)
        observer = embedding() if table else weight(Place((name,), edge))
        if observer is not None:
            _observe_weight(graph, observer, readers_of_it)
    graph.recompile()


def _weights(graph: fx.GraphModule) -> dict[str, list[tuple[fx.Node, fx.Node]]]:
    """Those of layers, gated ones too, then tables that are looked up in and read by nothing else, which would keep the
    real ones beside them; by name: who reads them, and as what."""
    read = [(node, source(node, 1)) for node in layers_of(graph)]
    read += gated_weights(graph)
    read += [(node, source(node)) for node in nodes_of(graph, {EMBEDDING}) if _looks_up(graph, node)]
    found: dict[str, list[tuple[fx.Node, fx.Node]]] = {}
    for reader, given in read:
        found.setdefault(str(given.target), []).append((reader, given))
    return {name: readers for name, readers in found.items() if not _read_as_it_is(graph, name, readers)}


def _read_as_it_is(graph: fx.GraphModule, table: str, readers: list[tuple[fx.Node, fx.Node]]) -> bool:
    """Whether it is a table that others read than `readers`, who look up in it."""
    known = {reader for reader, _ in readers}
    nodes = [node for node in graph.graph.nodes if node.op == "get_attr" and node.target == table]
    return all(reader.target is EMBEDDING for reader in known) and any(node.users.keys() - known for node in nodes)


def _looks_up(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether it looks up what follows from the input, in rows that are shorter as integers with a scale."""
    table = constant(graph, node.args[0])
    return table is not None and not node.meta.get("fixed") and table.shape[1] > 1


def _observe(graph: fx.GraphModule, value: fx.Node, name: str, readers: list[fx.Node]) -> fx.Node:
    """Put the module `name` between `value` and those of its `readers`; returns its node."""
    with graph.graph.inserting_after(value):
        observed = graph.graph.call_module(name, (value,))
    for reader in readers:
        reader.replace_input_with(value, observed)
    return observed


def _observe_weight(graph: fx.GraphModule, observer: nn.Module, readers: list[tuple[fx.Node, fx.Node]]) -> None:
    """Put `observer` on the constant that all `readers` read, each by a node of its own or all by one."""
    order = {node: place for place, node in enumerate(graph.graph.nodes)}
    given = min((read for _, read in readers), key=order.__getitem__)
    name = f"observe_{given.name}"
    graph.add_submodule(name, observer)
    with graph.graph.inserting_after(given):
        observed = graph.graph.call_module(name, (given,))
    for reader, read in readers:
        reader.replace_input_with(read, observed)


def _given(value: fx.Node) -> bool:
    return is_given(value) or (moves(value) and all(map(_given, value.all_input_nodes)))


def _nonnegative(value: fx.Node) -> bool:
    if value.target in POOLS or moves(value):
        return all(map(_nonnegative, value.all_input_nodes))
    return value.target in RECTIFIERS and rectified(value)[0] >= 0
