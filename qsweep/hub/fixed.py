"""What a model computes from parameters and numbers alone."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor, fx

from qsweep.hub.form import QuantizedModel
from qsweep.hub.kinds import COMPUTE, NORMS
from qsweep.hub.nodes import constant, is_trained, nodes_of, reached, set_constant
from qsweep.hub.ops import STORED

_READERS = COMPUTE | NORMS


def with_fixed_weights(graph: fx.GraphModule) -> None:
    """Make what layers and norms multiply by a constant where no input goes into it, in place.

    Weight norm, standardized weights and the like: their layers are then layers as any other, to be folded, quantized
    and trained, unless all that goes into them is frozen.
    """
    fixed = fixed_nodes(graph)
    wanted = {node for reader in nodes_of(graph, _READERS) for node in reader.all_input_nodes[1:] if node in fixed}
    computed = [node for node in graph.graph.nodes if node in wanted and node.op != "get_attr"]
    for node, value in _values(graph, computed).items():
        name, trainable = _name(graph, node, value), is_trained(graph, node)
        new = _as_constant(graph, node, name, value.clone(), trainable=trainable)
        new.meta["val"] = node.meta["val"]


def with_computed_layers(model: QuantizedModel) -> QuantizedModel:
    """Layers that no input goes into, such as those of a table of positions, as the constants that they give."""
    if not _computed_layers(model.graph):
        return model
    graph = copy.deepcopy(model.graph)
    _fold(graph, _computed_layers(graph))
    return replace(model, graph=graph)


def with_constants(graph: fx.GraphModule) -> fx.GraphModule:
    """All that no input goes into as constants, in place, but for weights of layers that are stored as integers."""
    _fold(graph, fixed_nodes(graph))
    return graph


def _fold(graph: fx.GraphModule, nodes: dict[fx.Node, None]) -> None:
    """Constants for those of `nodes` that others read, in place."""
    read = [node for node in nodes if not nodes.keys() >= node.users.keys()]
    computed = [node for node in read if node.op != "get_attr" and not _of_layer(node)]
    for node, value in _values(graph, computed).items():
        _as_constant(graph, node, f"{node.name}_computed", value.detach())
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _of_layer(node: fx.Node) -> bool:
    """Whether it gives a convolution or linear its weight."""
    return node.target in STORED and any(user.target in COMPUTE for user in node.users)


def _computed_layers(graph: fx.GraphModule) -> dict[fx.Node, None]:
    """Layers that depend on constants alone, and what depends on these, in order of execution."""
    found: dict[fx.Node, None] = {}
    for node in fixed_nodes(graph):
        if node.target in COMPUTE or any(given in found for given in node.all_input_nodes):
            found[node] = None
    return found


def _values(graph: fx.GraphModule, wanted: list[fx.Node]) -> dict[fx.Node, Tensor]:
    """What `wanted` give, in this order; nothing else is computed but what goes into them."""
    needed = reached(wanted, lambda node: node.all_input_nodes)
    interpreter = fx.Interpreter(graph, garbage_collect_values=False)
    with torch.no_grad():
        for node in [node for node in graph.graph.nodes if node in needed]:
            interpreter.env[node] = interpreter.run_node(node)
    return {node: interpreter.env[node] for node in wanted}


def _as_constant(graph: fx.GraphModule, node: fx.Node, name: str, value: Tensor, *, trainable: bool = False) -> fx.Node:
    """The constant `name` for all that read `node`."""
    set_constant(graph, name, value, trainable=trainable)
    with graph.graph.inserting_before(node):
        new = graph.graph.get_attr(name)
    node.replace_all_uses_with(new)
    return new


def fixed_nodes(graph: fx.GraphModule) -> dict[fx.Node, None]:
    """The constants, what the model makes from numbers (`torch.arange`), and what depends on these alone, in order of
    execution."""
    found: dict[fx.Node, None] = {}
    for node in graph.graph.nodes:
        computed = node.op == "call_function" and not _random(node)
        if node.op == "get_attr" or (computed and all(given in found for given in node.all_input_nodes)):
            found[node] = None
    return found


def _random(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and (
        torch.Tag.nondeterministic_seeded in node.target.tags or node.target._schema.is_mutable
    )


def _name(graph: fx.GraphModule, node: fx.Node, value: Tensor) -> str:
    """That of the constant that `node` scales or transposes, if nothing else reads it, else one of its own."""
    first = _first(node)
    read = [each for each in graph.graph.nodes if each.op == "get_attr" and each.target == first]
    given, last = constant(graph, read[0]) if read else None, read[:1]
    while last and last[0] is not node:
        last = list(last[0].users) if len(last[0].users) == 1 else []
    same = len(read) == 1 and last and given is not None and given.numel() == value.numel()
    return first if same else f"{first}_{node.name}"


def _first(node: fx.Node) -> str:
    """The name of the first constant that goes into `node`, or of what it is made of."""
    while node.op != "get_attr" and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return str(node.target) if node.op == "get_attr" else node.name
